"""Judges of the tasks: figures of true pictures, and of what must not be taken for them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import ImageColor

from made.cache import contract
from made.judged import CONDITIONS, COUNT, LABELS, NAMES, boxes, given, pictures, scenes
from made.stlpips_golden import seeded
from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts
from pipeline.conditions.lowres import enlarge, lowres
from pipeline.config import (
    ClassTask,
    InpaintTask,
    LayoutTask,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    TextTask,
    UnconditionalTask,
)
from pipeline.config.tasks.figures import PERCEIVED
from pipeline.config.tasks.found import facts_of, figures_of
from pipeline.config.tasks.table import TASK_FACTS
from pipeline.data.format.contract import Contract
from pipeline.errors import ShapeError
from pipeline.evaluation.measure import shapes_accuracy
from pipeline.evaluation.tasks.judge import Given, Judge, make_judge
from pipeline.models.perceptual.loaded import from_tensors
from pipeline.models.perceptual.network import Perceptual
from preprocess.shapes.drawing import render


def judge_of(task: TaskConfig, **changes: object) -> Judge:
    facts = {"conditions": CONDITIONS, "resolution": 64, "buckets": ((64, 64),), "latent_shape": (4, 8, 8)}
    return make_judge(contract(**{**facts, **changes}), task)


def figures(task: TaskConfig, drawn: np.ndarray, asked: Given, lone: bool = False) -> dict[str, float]:
    judge = judge_of(task)
    return judge.summary(judge.rows(drawn, asked), judge.rows(pictures(lone), given(lone)))


def permuted(asked: Given) -> Given:
    return replace(asked, members={name: np.roll(rows, -1, 0) for name, rows in asked.members.items()})


# --------------------------------------------------------------------------------------------------------------------
# True pictures, permuted conditions, trivial methods


@pytest.mark.parametrize("lone", [True, False])
def test_the_class_of_true_pictures_is_right_and_that_of_permuted_ones_is_not(lone: bool) -> None:
    task, asked = ClassTask(), given(lone)
    true = figures(task, pictures(lone), asked, lone)
    assert true["class_accuracy"] == 1.0 and true["class_accuracy_low"] < 1
    assert figures(task, pictures(lone), permuted(asked), lone)["class_accuracy"] < 0.15


def test_a_second_object_is_wrong_where_objects_are_alone_and_not_in_scenes_of_several() -> None:
    several = next(i for i, truth in enumerate(scenes()) if len(truth.objects) == 3)
    judge, drawn = judge_of(ClassTask()), pictures()[several : several + 1]
    asked = replace(given(), members={"cond.class": given().members["cond.class"][several : several + 1]})
    (row,) = judge.rows(drawn, asked)
    of_lone, of_scenes = (judge.rows(pictures(lone), given(lone)) for lone in (True, False))
    assert judge.summary([row], of_lone)["class_accuracy"] == 0
    assert judge.summary([row], of_scenes)["class_accuracy"] == 1


def test_the_class_of_a_smaller_object_is_not_that_of_the_scene() -> None:
    judge, lines = judge_of(ClassTask()), []
    for truth in scenes():
        sizes = sorted(truth.objects, key=lambda o: o.radius)
        if len(sizes) == 2 and sizes[1].radius - sizes[0].radius > 2:
            asked = Given([""] * 2, {"cond.class": np.array([thing.label - 1 for thing in sizes], np.int32)})
            lines.append([row["largest"] for row in judge.rows(np.stack([render(truth)] * 2), asked)])
    assert len(lines) > 5 and lines == [[0, 1]] * len(lines)


def test_layouts_of_true_pictures_are_right_and_permuted_ones_are_not() -> None:
    task = LayoutTask()
    true, wrong = figures(task, pictures(), given()), figures(task, pictures(), permuted(given()))
    assert true["layout_right"] >= 0.99 and true["layout_iou"] >= 0.93
    assert true["layout_recall"] >= 0.995 and true["layout_precision"] >= 0.995
    assert wrong["layout_right"] == 0 and wrong["layout_iou"] < 0.03
    assert wrong["layout_recall"] < 0.02 and wrong["layout_precision"] < 0.02


def test_a_layout_with_a_missing_or_another_object_is_wrong() -> None:
    judge, truth = judge_of(LayoutTask()), next(t for t in scenes() if len(t.objects) == 2)
    other = Given([""], {"cond.boxes": boxes(truth)[None]})
    (right,) = judge.rows(render(truth)[None], other)
    (missing,) = judge.rows(render(replace(truth, objects=truth.objects[:1]))[None], other)
    less = boxes(truth)[None].copy()
    less[0, 1] = -1
    (extra,) = judge.rows(render(truth)[None], replace(other, members={"cond.boxes": less}))
    assert right["layout_right"] == 1 and right["of_layout_recall"] == 2
    assert (missing["layout_right"], missing["layout_recall"], missing["of_layout_precision"]) == (0, 1, 1)
    assert missing["layout_iou"] == pytest.approx((right["layout_iou"] or 0) / 2, abs=0.05)
    assert (extra["layout_right"], extra["layout_precision"], extra["of_layout_precision"]) == (0, 1, 2)


def test_boxes_of_24_classes_are_judged_as_those_of_25_labels() -> None:
    members = given().members["cond.boxes"].copy()
    members[..., 0] -= members[..., 0] >= 0
    facts = replace(CONDITIONS, boxes=BoxFacts(count=24, most=5, names=NAMES))
    judge = judge_of(LayoutTask(), conditions=facts)
    assert judge.rows(pictures(), Given(given().captions, {"cond.boxes": members})) == judge_of(LayoutTask()).rows(
        pictures(), given()
    )


def test_label_maps_of_true_pictures_agree_and_pixel_accuracy_alone_says_little() -> None:
    task = SemanticTask()
    true, wrong = figures(task, pictures(), given()), figures(task, pictures(), permuted(given()))
    assert true["label_iou"] >= 0.94 and true["label_iou_foreground"] >= 0.94 and true["label_accuracy"] >= 0.99
    assert true["label_iou_error"] < 0.02
    assert wrong["label_iou"] < 0.06 and wrong["label_iou_foreground"] < 0.02
    assert 0.7 < wrong["label_accuracy"] < 0.85  # of background


def test_mean_iou_is_of_sums_over_all_pictures() -> None:
    """A label that one picture has and another lacks is one label, not the mean of two shares."""
    judge = judge_of(SemanticTask())
    rows = [{"both_0": 6.0, "either_0": 8.0, "both_1": 2.0, "either_1": 4.0}, {"both_0": 10.0, "either_0": 10.0}]
    assert judge.pooled("label_iou", rows) == pytest.approx((16 / 18 + 2 / 4) / 2)
    assert judge.pooled("label_iou_foreground", rows) == pytest.approx(2 / 4)


def test_true_pictures_show_whole_shapes_and_cut_or_blurred_ones_do_not() -> None:
    task = UnconditionalTask()
    assert figures(task, pictures(), given())["whole_shapes"] >= 0.99
    cut = np.roll(pictures(), 32, axis=2)  # most scenes have an object across the middle
    assert figures(task, cut, given())["whole_shapes"] < 0.75
    empty = np.full_like(pictures(), 220)
    assert figures(task, empty, given())["whole_shapes"] == 0


def test_bicubic_is_the_baseline_of_superres_and_the_truth_is_its_bound() -> None:
    judge = judge_of(SuperresTask())
    true = judge.summary(judge.rows(pictures(), given()))
    enlarged = judge.baseline(given())
    assert enlarged is not None
    assert np.array_equal(enlarged[3], enlarge(given().members["cond.lowres"][3], (64, 64)))
    bicubic = judge.summary(judge.rows(enlarged, given()))
    assert true["psnr"] == 100 and true["ssim"] == 1 and true["consistency"] == 100
    assert 26 < bicubic["psnr"] < 30 and bicubic["psnr_error"] < 0.5  # 27.48 dB of another 256 scenes
    assert 0.8 < bicubic["ssim"] < 0.98 and 30 < bicubic["consistency"] < 60


@pytest.mark.parametrize("degradation", ["box", "bicubic", "bsr"])
def test_consistency_makes_the_picture_small_as_the_cache_did(degradation: str) -> None:
    """What is drawn by chance cannot be made again, so there it is bicubic."""
    facts = LowresFacts(factor=4, degradation=degradation)  # type: ignore[arg-type]
    judge = judge_of(SuperresTask(), conditions=replace(CONDITIONS, lowres=facts))
    plain = replace(facts, degradation="box" if degradation == "box" else "bicubic")
    small = np.stack([lowres(picture, plain, "") for picture in pictures()[:4]])
    asked = Given([""] * 4, {"cond.lowres": small}, pictures()[:4])
    assert [row["consistency"] for row in judge.rows(pictures()[:4], asked)] == [100.0] * 4


def test_filling_holes_is_the_baseline_of_inpainting_and_the_truth_is_its_bound() -> None:
    judge = judge_of(InpaintTask())
    true = judge.summary(judge.rows(pictures(), given()))
    assert (true["psnr_inside"], true["psnr_outside"], true["completed"]) == (100, 100, 1.0)
    filled = judge.baseline(given())
    assert filled is not None
    floor = judge.summary(judge.rows(filled, given()))
    assert 11 < floor["psnr_inside"] < 16 and floor["psnr_outside"] == 100  # 13.1 dB of another 256 scenes
    assert 0.25 < floor["completed"] < 0.65  # .445 there
    assert 0 < floor["psnr_inside_error"] < 2


def test_psnr_inside_pools_the_squared_error_of_all_pictures() -> None:
    """The mean of pictures' own PSNRs is that of the flat ones, which have nothing to complete."""
    judge = judge_of(InpaintTask())
    rows = [
        {"inside": 0.0, "of_inside": 300.0, "outside": 0.0, "of_outside": 0.0},
        {"inside": 300 * 255.0**2 / 10, "of_inside": 300.0, "outside": 0.0, "of_outside": 0.0},
    ]
    assert judge.pooled("psnr_inside", rows) == pytest.approx(10 * np.log10(20))
    assert judge.pooled("psnr_outside", rows) is None


def test_pasting_leaves_what_was_known_exactly_and_the_outside_is_judged_before_it() -> None:
    judge, drawn = judge_of(InpaintTask()), 255 - pictures()
    finished = judge.finish(drawn, given())
    hole = np.unpackbits(given().members["cond.mask"], axis=-1).astype(bool)
    assert np.array_equal(finished[~hole], pictures()[~hole]) and np.array_equal(finished[hole], drawn[hole])
    assert judge.summary(judge.rows(drawn, given()))["psnr_outside"] < 5


def test_a_hole_of_everything_has_an_inside_alone_and_is_filled_with_grey() -> None:
    judge, few = judge_of(InpaintTask()), first(4, given())
    asked = replace(few, members={"cond.mask": np.full_like(few.members["cond.mask"], 255)})
    filled = judge.baseline(asked)
    assert filled is not None and (filled == 128).all()
    whole = judge.summary(judge.rows(255 - pictures()[:4], asked))
    assert whole["psnr_inside"] < 5
    assert not {"psnr_outside", "completed"} & set(whole), "nothing is known, and nothing is partly hidden"


# --------------------------------------------------------------------------------------------------------------------
# The perceptual distance


@cache
def distance() -> Perceptual:
    return from_tensors(seeded("alex"), "made")


def first(count: int, asked: Given) -> Given:
    members = {name: rows[:count] for name, rows in asked.members.items()}
    truth = None if asked.truth is None else asked.truth[:count]
    return Given(asked.captions[:count], members, truth, pictures()[:count])


def perceiving(task: TaskConfig) -> Judge:
    judge = judge_of(task)
    return make_judge(judge.contract, task, distance())


@pytest.mark.parametrize("task", [SuperresTask(), InpaintTask()], ids=lambda task: task.name)
def test_the_distance_is_0_for_true_pictures_and_grows_to_the_baseline_and_to_other_pictures(task: TaskConfig) -> None:
    judge, asked = perceiving(task), first(6, given())
    after = replace(permuted(asked), truth=np.roll(asked.pictures, -1, 0))
    plain = judge.baseline(asked)
    assert plain is not None
    true, trivial = (judge.summary(judge.rows(drawn, asked)) for drawn in (asked.pictures, plain))
    other = judge.summary(judge.permuted(asked.pictures, after))
    assert true["st_lpips"] == true["st_lpips_error"] == 0
    assert 0 < trivial["st_lpips"] < other["st_lpips"] and other["st_lpips_error"] > 0
    assert set(other) == {"st_lpips", "st_lpips_error"}  # nothing else is judged by the next image's


def test_the_distance_is_of_pictures_from_minus_1_to_1() -> None:
    """With values from 0 to 1 the network sees half of the contrast."""
    asked = first(3, given())
    drawn = np.roll(asked.pictures, 1, 2)
    found = [row["st_lpips"] for row in perceiving(SuperresTask()).rows(drawn, asked)]
    x, y = (torch.from_numpy(p.astype(np.float32)).permute(0, 3, 1, 2) for p in (drawn, asked.pictures))
    assert found == pytest.approx(distance().distance(x / 127.5 - 1, y / 127.5 - 1).tolist(), rel=1e-5)
    assert found != pytest.approx(distance().distance(x / 255, y / 255).tolist(), rel=0.05)


def test_the_distance_of_an_inpainted_picture_is_that_of_the_pasted_one() -> None:
    judge, asked = perceiving(InpaintTask()), first(3, given())
    drawn = 255 - asked.pictures
    pasted = judge.finish(drawn, asked)
    of_drawn, of_pasted = ([row["st_lpips"] for row in judge.rows(p, asked)] for p in (drawn, pasted))
    whole = [row["st_lpips"] for row in perceiving(SuperresTask()).rows(drawn, asked)]
    assert of_drawn == of_pasted and all(0 < a < b for a, b in zip(of_drawn, whole))  # type: ignore[operator]


@pytest.mark.parametrize("task", [SuperresTask(), InpaintTask()], ids=lambda task: task.name)
def test_without_its_weights_there_is_no_distance_and_the_card_names_none(task: TaskConfig) -> None:
    judge, asked = judge_of(task), first(2, given())
    assert "st_lpips" not in judge.rows(asked.pictures, asked)[0]
    assert "st_lpips" not in judge.facts({}, 4)["figures"] and "perceptual" not in judge.facts({}, 4)
    facts = perceiving(task).facts({}, 4)
    assert facts["figures"][-1] == "st_lpips" and facts["perceptual"] == "st-alex"
    assert facts["perceptual_sha256"] == distance().sha256


def test_a_cache_of_pictures_too_small_for_the_distance_is_refused() -> None:
    small = contract(conditions=CONDITIONS, buckets=((64, 64), (96, 24)))
    with pytest.raises(ShapeError, match=r"32 pixels or more along a side, and these have 24: leave it out"):
        make_judge(small, SuperresTask(), distance())


# --------------------------------------------------------------------------------------------------------------------
# What may be judged


@pytest.mark.parametrize("task", [ClassTask(), LayoutTask(), SemanticTask()])
def test_conditions_of_another_world_have_no_figures_of_shapes(task: TaskConfig) -> None:
    other = replace(
        CONDITIONS,
        classes=ClassFacts(count=24, names=NAMES[::-1]),
        boxes=BoxFacts(count=25, most=5, names=LABELS[::-1]),
        labels=LabelFacts(count=25, grid=4, names=LABELS[::-1]),
    )
    for changes in ({"conditions": other}, {"buckets": ((128, 128),)}, {"buckets": ((64, 64), (48, 80))}):
        judge = judge_of(task, **changes)
        assert not judge.looks and judge.reads == task.members
        assert judge.summary(judge.rows(pictures(), given())) == {}


def test_captions_of_another_world_have_no_figures_of_shapes() -> None:
    bare = {"conditions": Conditions()}
    for task in (TextTask(), UnconditionalTask()):
        judge = judge_of(task, **bare)
        assert len(judge.summary(judge.rows(pictures(), given()))) >= 3
        dogs = replace(given(), captions=["a photo of my dog", *given().captions[1:]])
        assert judge.summary(judge.rows(pictures(), dogs)) == {}
        assert judge.summary(judge.rows(np.zeros((2, 32, 32, 3), np.uint8), Given(["a red disc"] * 2, {}))) == {}
    judge = judge_of(UnconditionalTask(), text=None, caption_key="", **bare)
    assert not judge.looks and judge.summary(judge.rows(pictures(), replace(given(), captions=[""] * COUNT))) == {}


def test_pictures_compared_with_reconstructions_have_names_that_say_so() -> None:
    asked = given(truth=False)
    for task in (SuperresTask(), InpaintTask()):
        judge = judge_of(task, conditions=replace(CONDITIONS, pixels=False))
        names = {name for name in judge.summary(judge.rows(pictures(), asked)) if not name.endswith(("_low", "_high"))}
        names -= {name for name in names if name.endswith("_error")}
        figures = [figure for figure in facts_of(task).figures if figure not in PERCEIVED]
        assert names == {figure.name + ("_to_reconstruction" if figure.compares else "") for figure in figures}
        judge.perceptual = distance()
        far = judge.summary(judge.rows(pictures()[:2], first(2, asked)))
        assert {"st_lpips_to_reconstruction", "st_lpips_to_reconstruction_error"} <= far.keys()
        assert judge.facts({}, 4)["truth"] == "reconstruction" and "pixels" not in judge.reads
    assert "pixels" in judge_of(SuperresTask()).reads and judge_of(SuperresTask()).facts({}, 4)["truth"] == "pixels"


def test_attribute_accuracy_is_what_it_was() -> None:
    captions = [*given().captions[1:], given().captions[0]]
    captions[::2] = given().captions[::2]
    judge = judge_of(TextTask())
    found = judge.summary(judge.rows(pictures(), Given(captions, {})))
    was = shapes_accuracy(pictures(), captions)
    assert 0.4 < found["attribute_accuracy"] == was["overall"] < 0.9
    assert found["attribute_accuracy_by_objects"] == was["by_objects"]
    assert found["attribute_accuracy_by_attribute"] == was["by_attribute"]


# --------------------------------------------------------------------------------------------------------------------
# Classes of an evaluation


def even_classes(count: int, records: int) -> dict[str, np.ndarray]:
    return {"cond.class": np.random.RandomState(0).randint(0, count, records).astype(np.int32)}


def test_classes_that_occur_evenly_are_drawn_in_turn_and_the_card_says_so() -> None:
    judge, records = judge_of(ClassTask()), even_classes(24, 600)
    assert judge.facts(records, 48)["classes"] == "even"
    drawn = judge.members(records, range(46, 50), 48)["cond.class"]
    assert drawn.tolist() == [22, 23, 0, 1] and drawn.dtype == np.int32


@pytest.mark.parametrize("why", ["skewed", "few images", "few records", "sorted"])
def test_other_classes_are_those_of_the_records_which_start_over(why: str) -> None:
    judge, records, images = judge_of(ClassTask()), even_classes(24, 600), 48
    classes = records["cond.class"]
    if why == "skewed":
        classes[:] = np.where(np.random.RandomState(1).rand(600) < 0.5, classes // 2, classes)
    elif why == "few images":
        images = 23
    elif why == "few records":
        records = {"cond.class": classes[:100]}
    else:
        classes[:] = np.arange(600) // 100
    count = len(records["cond.class"])
    assert judge.facts(records, images)["classes"] == "records"
    drawn = judge.members(records, [0, count - 1, count], images)["cond.class"]
    assert drawn.tolist() == [records["cond.class"][i] for i in (0, count - 1, 0)]


# --------------------------------------------------------------------------------------------------------------------
# What is shown


def test_what_was_given_is_shown_in_words_and_pictures() -> None:
    asked, truth = given(), scenes()[0]
    assert judge_of(ClassTask()).words(asked, 0) == NAMES[int(asked.members["cond.class"][0])]
    assert judge_of(LayoutTask()).words(asked, 0) == ", ".join(f"{o.colour} {o.shape}" for o in truth.objects)
    assert judge_of(LayoutTask(text=True)).words(asked, 0).startswith(truth.caption + "; ")
    assert judge_of(SemanticTask()).words(asked, 0).split(", ")[0] == "background"
    assert judge_of(SuperresTask()).words(asked, 0) == judge_of(UnconditionalTask()).words(asked, 0) == ""
    assert judge_of(ClassTask()).show(asked, 0) is None
    for task in (LayoutTask(), SemanticTask(), SuperresTask(), InpaintTask()):
        shown = judge_of(task).show(asked, 0)
        assert shown is not None and shown.shape == (64, 64, 3) and shown.dtype == np.uint8
    small = judge_of(SuperresTask()).show(asked, 0)
    assert small is not None and np.array_equal(small[::4, ::4].transpose(2, 0, 1), asked.members["cond.lowres"][0])
    boxed = judge_of(LayoutTask()).show(asked, 0)
    x0, y0 = (round(edge) for edge in truth.objects[0].box[:2])
    colour = ImageColor.getrgb(truth.objects[0].colour)
    assert boxed is not None and tuple(boxed[y0, x0 + 2]) == colour and tuple(boxed[0, 0]) != colour
    mapped = judge_of(SemanticTask()).show(asked, 0)
    assert mapped is not None and tuple(mapped[tuple(int(c) for c in truth.objects[0].centre[::-1])]) == colour


def test_classes_without_names_and_more_than_they_are_shown_by_number() -> None:
    facts = replace(CONDITIONS, classes=ClassFacts(count=1000))
    assert judge_of(ClassTask(), conditions=facts).words(Given([""], {"cond.class": np.array([7])}), 0) == "class 7"


# --------------------------------------------------------------------------------------------------------------------
# The table


def test_every_judge_has_the_figures_of_its_row() -> None:
    for facts in TASK_FACTS.values():
        task = facts.config()
        judge = judge_of(task)
        assert isinstance(judge, Judge) and judge.figures == facts.figures and judge.task is task
        assert len({figure.name for figure in figures_of(task)}) == len(figures_of(task))
        assert not any("_by_" in figure.name for figure in figures_of(task))  # these are tables


def test_a_contract_without_conditions_makes_judges_of_old_caches() -> None:
    old: Contract = contract()
    for task in (TextTask(), UnconditionalTask()):
        judge = make_judge(old, task)
        assert judge.summary(judge.rows(np.zeros((1, 16, 16, 3), np.uint8), Given(["a cat"], {}))) == {}
