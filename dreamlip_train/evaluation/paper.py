"""Numbers of the paper (DreamLIP, ECCV 2024), in percent, to set ours beside. Only those that could be looked up; a gap is a gap.

Models are trained with ShareGPT4V captions; names are the paper's data sets and models.
"""

# Table 2, accuracy of zero-shot classification.
ZERO_SHOT = {"imagenet1k": {"CC3M, ViT-B/16": 31.1, "CC3M, CLIP, ViT-B/16": 20.3}}

# Table 1, R@1 of ViT-B/32: (Flickr30k image to text, COCO image to text, Flickr30k text to image, COCO text to image).
RETRIEVAL = {
    "YFCC15M, CLIP": (34.9, 20.8, 23.4, 13.0),
    "YFCC15M, DreamLIP": (84.9, 55.7, 66.0, 39.8),
    "merged 30M, CLIP": (57.8, 35.0, 44.0, 23.5),
    "merged 30M, DreamLIP": (87.2, 58.3, 66.4, 41.1),
    "LAION-400M, CLIP": (78.7, 53.7, 61.8, 34.8),
}

# Table 3, mIoU of SAN (trained on COCO-Stuff) on features of ViT-B/16: (ADE-150, PC-59, VOC-20). Not comparable with training-free segmentation.
SEGMENTATION = {
    "merged 30M, CLIP": (21.0, 45.8, 86.9),
    "merged 30M, DreamLIP": (25.3, 49.9, 90.9),
    "LAION-400M, CLIP": (21.3, 46.3, 88.3),
}

# Table 6, CC3M, ViT-B/16: (Flickr30k image to text R@1, COCO image to text R@1, ImageNet accuracy).
ABLATION = {
    "raw caption": (32.6, 14.8, 20.3),
    "+ long caption as one text": (56.6, 30.2, 24.4),
    "+ long caption, sampled": (63.0, 35.7, 30.0),
    "+ short caption": (68.3, 40.8, 30.1),
    "+ grouping loss": (69.5, 42.8, 31.1),
}
