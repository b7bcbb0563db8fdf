"""ADE20K: UperNet on the ViT pyramid, through mmsegmentation."""
