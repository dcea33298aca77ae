"""Old names of the tree's decoding kernels."""

from visar.kernels.tree_decoder import decode_tree, guide_tree, move_path

__all__ = ["decode_tree", "guide_tree", "move_path"]
