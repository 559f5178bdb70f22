"""Text from a running model: engines, sampling, batches, chats, and `load_model`, the Python API for running."""

NEW_TOKENS = 256  # the most tokens of a completion, unless the caller gives a limit
NEW_TOKENS_CHAT = 1024  # and of an answer in a chat
NEW_TOKENS_THINKING = 4096  # and of an answer with the thoughts before it
MOST_LOGPROBS = 20  # alternatives of a token whose log probabilities can be asked for, OpenAI's own bound
