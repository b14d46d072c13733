"""Images from files, PIL and tensors to the network's input pixels."""
