"""Classifiers: ImageNet, iNaturalist, Places and folders; fine-tuned whole and in part, probed, k-NN, under shift."""
