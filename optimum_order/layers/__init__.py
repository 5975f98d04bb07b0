"""One layer and its promises, as pure tensors."""
