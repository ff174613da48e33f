"""AMTL layers in models of other libraries, a module for each; none imports its library.

- `deepctr`: deepctr-torch.
"""
