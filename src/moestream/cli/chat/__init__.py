"""``moestream chat``: a conversation at the terminal."""

from moestream.cli.chat.command import chat

__all__ = ["chat"]
