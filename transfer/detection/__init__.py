"""COCO: Mask R-CNN with a ViT-FPN, on detectron2 or on torchvision."""
