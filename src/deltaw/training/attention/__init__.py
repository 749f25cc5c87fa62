"""The attention of a training run. choice.py chooses it; short_rows.py and tree.py compute what the model's own would."""

from deltaw.training.attention.choice import (
    NoTree,
    implementation,
    mask_of,
    takes_trees,
    training_attention,
    without_trees,
)

__all__ = ["NoTree", "implementation", "mask_of", "takes_trees", "training_attention", "without_trees"]
