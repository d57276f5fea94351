"""What is stored where: safetensors headers, the checkpoint index, expert tables and the codecs of every encoding."""
