"""The GPUs of a node: what they offer for sharing, which mechanism fits, and the agent that looks after them."""
