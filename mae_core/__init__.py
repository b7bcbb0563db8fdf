"""MAE itself: the pre-trainer, and what a ViT encoder is. Knows nothing of any downstream task."""
