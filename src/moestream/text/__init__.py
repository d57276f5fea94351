"""Text at the edges: tokenizer with incremental decoding, chat templates in a sandbox, tool calls."""
