"""The verb that brings annotations of others into shards: convert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipeline.config.datasets import LimitsConfig
from pipeline.config.values.bounds import Between, Ge


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """latentmill convert: annotations that others keep in files of their own, and the images that they are of, to tars
    that encode takes with its conditions. Images are copied as they are (docs/how_to/convert_annotations.md)."""

    from_: Literal["coco", "openimages", "labels", "classes"]
    """What there is. coco: json files of instances, stuff or captions. openimages: csv files of boxes. labels: a label
    map for each image, in a folder of their own or beside the images. classes: a folder of images for each class, as
    ImageNet has them."""
    images: str
    """Folder of the images, local, s3://, gs:// or az://. Annotations name them relative to it; images of OpenImages
    may also lie in folders below."""
    annotations: tuple[str, ...] = ()
    """Files of annotations, for coco and openimages: paths, URLs or patterns. Several files of the same images are
    joined ("[annotations/instances_train2017.json,annotations/captions_train2017.json]")."""
    labels: str = ""
    """Folder of label maps, for labels and coco: PNGs of 8-bit greys or a palette's numbers, each named like its image
    (a/b.png for a/b.jpg). It may be the images' own."""
    names: str = ""
    """File of names. openimages: class-descriptions-boxable.csv. classes: the folders in the order of their numbers: a
    .txt with FOLDER, or FOLDER, a tab and a name, or nNNNNNNNN NAME in each line, or a .json list or
    imagenet_class_index.json; "" = the folders, sorted. labels: the name of each value: a .json {"7": "road"} or a .txt
    with a name in each line; values are then numbered anew without holes; "" = maps are copied as they are. (The names
    of coco are in its own files.)"""
    dest: str
    """Folder, or URL in a bucket (s3://, gs://, az://), for the tars, their files of names and convert.json."""
    shard_size: Annotated[int, Between(1, 100_000)] = 1000
    """Images per tar, before those that are rejected are left out."""
    crowds: Literal["own", "same", "leave_out"] = "own"
    """What becomes of a box around several objects (iscrowd, IsGroupOf). own: it has a class of its own,
    "NAME (group)", numbered after the others. same: it has the class of its objects. leave_out: it is left out and
    counted."""
    leave_out: tuple[str, ...] = ()
    """Names of classes whose boxes are left out and counted ("[other]" of COCO's stuff); they get no number."""
    min_boxes: Annotated[int, Ge(0)] = 0
    """Fewest boxes of an image; one with fewer is left out and counted."""
    max_boxes: Annotated[int, Ge(0)] = 0
    """Most boxes of an image; one with more is left out and counted. 0 = any number (encode stores the largest)."""
    image_end: str = ""
    """End of the names of images, before the suffix, that those of label maps do not have ("_leftImg8bit")."""
    label_end: str = ""
    """End of the names of label maps, before .png, that those of images do not have ("_gtFine_labelIds", "_seg")."""
    label_offset: Annotated[int, Between(0, 255)] = 0
    """What is added to each value of a label map, modulo 256, before it is looked up in names or COCO's categories: 1
    for the pixel maps of COCO-Stuff, in which 255 is unlabelled and becomes 0."""
    max_rejects: Annotated[float, Between(0, 1)] = 0.1
    """Largest share of images, and of annotations, that may be defective (what is left out by choice does not count);
    above it, convert fails."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Limits on images and captions: member_bytes, pixels and caption_bytes."""
