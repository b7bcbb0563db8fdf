"""What COCO runs on. A file of its own, since run_all.py reads its command line before anything else is imported."""

ENGINES = {"detectron2": "detectron2", "torchvision": "torchvision"}  # name -> module it needs, best first
