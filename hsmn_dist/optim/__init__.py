"""Update rules on whole tensors; knows no model class."""
