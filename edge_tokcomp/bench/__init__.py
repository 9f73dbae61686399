"""An honest benchmark: our arms beside llama-cpp-python's ``MTMDChatHandler``, on the same files in the same run."""
