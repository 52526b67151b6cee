"""The caption files that people bring, each of exactly its layout, and what their rows are in our columns."""

import gzip
import json

import pyarrow

LONG = "In the center of the image, a red bus stands. Behind it, two trees grow."
PIECES = ["In the center of the image, a red bus stands.", "Behind it, two trees grow."]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def text(records):
    return json.dumps(records).encode()


# name: (file name, content, layout, {image: its sub-captions by column})
LAYOUTS = {
    "ShareGPT4V": (
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        text(
            [
                {
                    "id": "000000000009",
                    "image": "coco/train2017/000000000009.jpg",
                    "conversations": [
                        {"from": "human", "value": "What do you see happening in this image?\n<image>"},
                        {"from": "gpt", "value": LONG},
                    ],
                },
                {
                    "id": "sa_7",
                    "image": "sam/images/sa_7.jpg",
                    "conversations": [
                        {"from": "human", "value": "<image>\nDescribe."},
                        {"from": "gpt", "value": "A cat."},
                    ],
                },
            ]
        ),
        "ShareGPT4V / LLaVA conversations",
        {
            "coco/train2017/000000000009.jpg": {"longSV_captions": PIECES},
            "sam/images/sa_7.jpg": {"longSV_captions": ["A cat."]},
        },
    ),
    "BLIP": (
        "ccs_synthetic_filtered_large.json",
        text([{"image": "/export/cc/1.jpg", "caption": "a dog"}, {"image": "/export/cc/2.jpg", "caption": "a cat"}]),
        "ALBEF / BLIP annotations",
        {"/export/cc/1.jpg": {"raw_caption": ["a dog"]}, "/export/cc/2.jpg": {"raw_caption": ["a cat"]}},
    ),
    "ALBEF, several captions": (
        "flickr30k_val.json",
        text([{"image": "flickr30k-images/1.jpg", "caption": ["A dog.", "One dog runs."]}]),
        "ALBEF / BLIP annotations",
        {"flickr30k-images/1.jpg": {"raw_caption": ["A dog.", "One dog runs."]}},
    ),
    "BLIP, a row per caption": (
        "coco_karpathy_train.json",
        text(
            [
                {"caption": "A dog.", "image": "val2014/1.jpg", "image_id": "coco_1"},
                {"caption": "One dog runs.", "image": "val2014/1.jpg", "image_id": "coco_1"},
                {"caption": "A cat.", "image": "val2014/2.jpg", "image_id": "coco_2"},
            ]
        ),
        "ALBEF / BLIP annotations",
        {
            "val2014/1.jpg": {"raw_caption": ["A dog.", "One dog runs."]},
            "val2014/2.jpg": {"raw_caption": ["A cat."]},
        },
    ),
    "FLAIR, Urban1k": (
        "annotations.json",
        text({"annotations": [{"image_id": 0, "image": "1.jpg", "caption": LONG}]}),
        "FLAIR annotations",
        {"1.jpg": {"long_captions": PIECES}},
    ),
    "FLAIR, fine-grained": (
        "test_annotations.json",
        text(
            {
                "annotations": [
                    {"image_id": 0, "image": "docci/test_00731.jpg", "caption": "A white toilet", "caption_id": 0},
                    {"image_id": 0, "image": "docci/test_00731.jpg", "caption": "It has a lid", "caption_id": 1},
                ]
            }
        ),
        "FLAIR annotations",
        {"docci/test_00731.jpg": {"long_captions": ["A white toilet", "It has a lid"]}},
    ),
    "COCO": (
        "captions_val2017.json",
        text(
            {
                "info": {"year": 2017},
                "images": [{"id": 179765, "file_name": "000000179765.jpg", "height": 480}],
                "annotations": [
                    {"image_id": 179765, "id": 38, "caption": "A black bike."},
                    {"image_id": 179765, "id": 182, "caption": "A Honda."},
                ],
            }
        ),
        "COCO captions",
        {"000000179765.jpg": {"raw_caption": ["A black bike.", "A Honda."]}},
    ),
    "Karpathy": (
        "dataset_coco.json",
        text(
            {
                "images": [
                    {
                        "filepath": "val2014",
                        "filename": "COCO_val2014_000000391895.jpg",
                        "imgid": 0,
                        "split": "test",
                        "sentences": [{"tokens": ["a", "man"], "raw": "A man.", "sentid": 0}, {"raw": "A bike."}],
                    }
                ],
                "dataset": "coco",
            }
        ),
        "Karpathy's splits",
        {"COCO_val2014_000000391895.jpg": {"raw_caption": ["A man.", "A bike."]}},
    ),
    "CC3M": (
        "Train_GCC-training.tsv",
        b"a very typical bus station\thttp://h/0.jpg\nsierra looked stunning, in this top\thttps://h/1.jpg\n",
        "Conceptual Captions, no header",
        {
            "http://h/0.jpg": {"raw_caption": ["a very typical bus station"]},
            "https://h/1.jpg": {"raw_caption": ["sierra looked stunning, in this top"]},
        },
    ),
    "CC12M": (
        "cc12m.tsv",
        b"https://h/0.jpg?x=1\t<PERSON> in 1905\n",
        "Conceptual Captions, no header",
        {"https://h/0.jpg?x=1": {"raw_caption": ["<PERSON> in 1905"]}},
    ),
    "Flickr8k, a row per caption": (
        "captions.csv",
        b"image,caption\n1.jpg,A child .\n1.jpg,A girl .\n1.jpg,A girl .\n2.jpg,A dog .\n",
        "ALBEF / BLIP annotations",
        {"1.jpg": {"raw_caption": ["A child .", "A girl .", "A girl ."]}, "2.jpg": {"raw_caption": ["A dog ."]}},
    ),
    "DOCCI": (
        "docci_descriptions.jsonlines",
        lines(
            [
                {"example_id": "train_00000", "split": "train", "image_file": "train_00000.jpg", "description": LONG},
                {"example_id": "test_00000", "split": "test", "image_file": "test_00000.jpg", "description": "A can."},
            ]
        ),
        "DOCCI descriptions",
        {"train_00000.jpg": {"long_captions": PIECES}, "test_00000.jpg": {"long_captions": ["A can."]}},
    ),
    "DreamLIP JSON": (
        "records.json",
        text([{"ImagePath": "http://h/1.jpg", "RawCaption": "a bus", "LLACaptionLong": LONG}]),
        "DreamLIP's JSON",
        {"http://h/1.jpg": {"raw_caption": ["a bus"], "longLLA_captions": PIECES}},
    ),
    "gz": (
        "captions.csv.gz",
        gzip.compress(f'Image Path,raw_caption,longIB_captions\n1.jpg,a bus,"{LONG}"\n'.encode()),
        "DreamLIP's columns",
        {"1.jpg": {"raw_caption": ["a bus"], "longIB_captions": PIECES}},
    ),
    "zst": (
        "docci.jsonl.zst",
        pyarrow.compress(lines([{"image_file": "1.jpg", "description": LONG}]), codec="zstd", asbytes=True),
        "DOCCI descriptions",
        {"1.jpg": {"long_captions": PIECES}},
    ),
}
PUBLISHED = {
    "Recap-DataComp": {
        "url": "http://h/1.jpg",
        "re_caption": LONG,
        "org_caption": "bus for sale",
        "sha256": "00",
        "key": "0",
        "re_clip_score": 0.3,
    },
    "PixelProse": {
        "uid": "0",
        "url": "http://h/1.jpg",
        "key": "0",
        "status": "success",
        "original_caption": "bus for sale",
        "vlm_model": "gemini-pro-vision",
        "vlm_caption": LONG,
    },
}
