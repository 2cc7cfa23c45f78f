"""`init=` of tasks: what a task has learned is taken where it fits, and other inputs of inpainting are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from made.task_run import Made, make_task_run, seeded
from pipeline import export
from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.config import (
    ClassTask,
    ExportConfig,
    InpaintTask,
    LayoutTask,
    SemanticTask,
    SuperresTask,
    TaskConfig,
    TextTask,
    UnconditionalTask,
)
from pipeline.errors import WeightsError
from pipeline.inference.trained import load_trained
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from pipeline.models.weights import weights_hash
from pipeline.training.start import begin

CLASSES = Conditions(classes=ClassFacts(count=5))
MASKS = Conditions(mask=MaskFacts(kinds=("rectangles",), pooling="nearest"))
LDM = MaskFacts(kinds=("rectangles",), pooling="nearest", order="masked_mask", low=-1, hole="black")
OWN: dict[str, tuple[TaskConfig, Conditions, dict[str, Any]]] = {
    "class": (ClassTask(), CLASSES, {}),
    "layout": (LayoutTask(), Conditions(boxes=BoxFacts(count=6, most=4)), {}),
    "layout-text": (LayoutTask(text=True), Conditions(boxes=BoxFacts(count=6, most=4)), {"text": True}),
    "semantic": (SemanticTask(labels="average", width=3), Conditions(labels=LabelFacts(count=5, grid=2)), {}),
    "text": (
        TextTask(encoder="transformer", depth=2, heads=2, head_width=8),
        Conditions(),
        {"text": True, "storage": "tokens"},
    ),
}


def begun(made: Made, source: Path | str, **task: Any) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser of a run like `made` that begins with other weights, and what was recorded."""
    config = replace(made.config, init=str(source), task=replace(made.config.task, **task))
    text = made.contract.text
    empty = None if text is None else torch.zeros(text.length, text.width)
    denoiser = Denoiser(config.model, make_task(config.task, config.model, made.contract, empty))
    denoiser.reset_parameters(1)
    return denoiser, begin(config, denoiser, made.contract)


def exported(made: Made, where: Path, form: str) -> str:
    if form == "run":
        return made.config.run
    dest = str(where / ("folder" if form == "diffusers" else "model.safetensors"))
    export.main(ExportConfig(run=made.config.run, dest=dest, format=form, check=False))  # type: ignore[arg-type]
    return dest


def refusal(made: Made, source: Path | str) -> str:
    with pytest.raises(WeightsError) as caught:
        begun(made, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ["run", "diffusers", "compvis"])
@pytest.mark.parametrize("name", OWN)
def test_a_task_takes_its_own_weights_from_the_same_task(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    task, facts, changes = OWN[name]
    made = make_task_run(tmp_path, task, facts, **changes)
    source = exported(made, tmp_path, form)
    capsys.readouterr()
    denoiser, record = begun(made, source, drop=0.3)
    expected = load_trained(made.config.run).state
    assert all(torch.equal(tensor, expected[key]) for key, tensor in denoiser.state_dict().items())
    own = {key.removeprefix("task."): value for key, value in expected.items() if key.startswith("task.")}
    assert record["task"] == {"taken": True, "sha256": weights_hash(own.items())}
    assert f"takes {len(own)} tensors of task={task.name} too" in capsys.readouterr().err


def test_weights_of_a_task_that_do_not_fit_begin_anew_and_the_log_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = make_task_run(tmp_path, ClassTask(), CLASSES, name="source")
    for name, task, facts, why in (
        ("count", ClassTask(), Conditions(classes=ClassFacts(count=9)), "embed.weight is (6, 128) there and (10, 128)"),
        ("kind", LayoutTask(coordinates=False), Conditions(boxes=BoxFacts(count=6, most=4)), "they are of task=class"),
    ):
        made = make_task_run(tmp_path, task, facts, name=name)
        capsys.readouterr()
        denoiser, record = begun(made, source.config.run)
        assert record["task"]["taken"] is False and why in record["task"]["why"]
        assert f"begins anew: of {source.config.run}, {why}" in capsys.readouterr().err
        fresh = seeded(Denoiser(made.config.model, make_task(task, made.config.model, made.contract)))
        fresh.reset_parameters(1)
        assert all(
            torch.equal(value, fresh.task.state_dict()[key]) for key, value in denoiser.task.state_dict().items()
        )
        unet = load_trained(source.config.run).state["unet.conv_out.weight"]
        assert torch.equal(denoiser.unet.conv_out.weight, unet)


def test_another_number_of_heads_of_the_same_shapes_does_not_fit(tmp_path: Path) -> None:
    facts = Conditions(boxes=BoxFacts(count=6, most=4))
    task = LayoutTask(encoder="transformer", heads=2, head_width=8)
    source = make_task_run(tmp_path, task, facts, name="source")
    made = make_task_run(tmp_path, replace(task, heads=4, head_width=4), facts)
    assert begun(made, source.config.run)[1]["task"]["why"] == "task.heads is 2 there and 4 here"


def test_classes_of_other_names_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sources = [
        make_task_run(tmp_path, ClassTask(), Conditions(classes=ClassFacts(count=2, names=names)), name=names[0])
        for names in (("cat", "dog"), ("dog", "cat"))
    ]
    assert begun(sources[0], sources[1].config.run)[1]["task"]["taken"]
    assert "the classes of" in capsys.readouterr().err


def test_text_becomes_inpainting_with_new_channels_at_zero_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = make_task_run(tmp_path, TextTask(), Conditions(), text=True, name="source")
    made = make_task_run(tmp_path, InpaintTask(text=True), MASKS, text=True)
    denoiser, record = begun(made, source.config.run)
    assert (record["new_input_channels"], record["new_inputs"]) == (5, "the mask, then the masked picture's latent")
    assert not denoiser.unet.conv_in.weight[:, 4:].any()
    assert "after the first 4 are new, and start at zero: the mask, then" in capsys.readouterr().err
    assert "task" not in record


@dataclass(frozen=True)
class Inpainting:
    """A run of inpainting, and its weights in each form."""

    run: Made
    exports: dict[str, str]


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Inpainting:
    folder = tmp_path_factory.mktemp("inpainting")
    run = make_task_run(folder, InpaintTask(), MASKS, name="source")
    return Inpainting(run, {form: exported(run, folder, form) for form in ("run", "diffusers", "compvis")})


@pytest.mark.parametrize("form", ["run", "diffusers", "compvis"])
@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"order": "masked_mask"}, "order: mask_masked there, masked_mask here"),
        ({"low": -1}, "low: 0 there, -1 here"),
        ({"hole": "black"}, "hole: grey there, black here"),
        ({"pooling": "max"}, "pooling: nearest there, max here"),
    ],
)
def test_other_inputs_of_inpainting_are_refused(
    inpainting: Inpainting, facts: dict[str, Any], said: str, form: str, tmp_path: Path
) -> None:
    assert MASKS.mask is not None
    made = make_task_run(tmp_path, InpaintTask(), Conditions(mask=replace(MASKS.mask, **facts)))
    line = refusal(made, inpainting.exports[form])
    assert said in line and "mask.convention" in line
    assert "new_input_channels" not in begun(inpainting.run, inpainting.exports[form])[1]


def test_published_inpainting_is_known_by_its_pipeline_and_by_its_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Stable Diffusion's has 4 + 1 + 4 channels, Rombach et al.'s 3 + 3 + 1; neither file tells its order."""
    made = make_task_run(tmp_path, InpaintTask(text=True), MASKS, text=True, name="stable")
    folder = Path(exported(made, tmp_path, "diffusers"))
    (folder / "task.json").unlink()
    capsys.readouterr()
    begun(made, folder)
    assert "warning" not in capsys.readouterr().err
    other = make_task_run(tmp_path, InpaintTask(text=True), Conditions(mask=LDM), text=True, name="other")
    assert "order: mask_masked there, masked_mask here" in refusal(other, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    begun(made, folder)
    assert "does not say what its 5 input channels after the latent's are" in capsys.readouterr().err

    rombach = make_task_run(tmp_path, InpaintTask(), Conditions(mask=LDM), channels=3, name="rombach")
    whole = load_file(exported(rombach, tmp_path, "compvis"))
    save_file(whole, tmp_path / "released.safetensors", {"format": "pt"})
    begun(rombach, tmp_path / "released.safetensors")
    mine = make_task_run(tmp_path, InpaintTask(), MASKS, channels=3, name="mine")
    assert "order: masked_mask there, mask_masked here" in refusal(mine, tmp_path / "released.safetensors")


def test_input_channels_of_another_task_are_refused(tmp_path: Path) -> None:
    lowres = Conditions(lowres=LowresFacts(factor=4, degradation="bicubic"))
    source = make_task_run(tmp_path, SuperresTask(), lowres, name="source")
    made = make_task_run(tmp_path, InpaintTask(), MASKS)
    assert "reads 3 input channels of task=superres after the latent's" in refusal(made, source.config.run)
    plain = make_task_run(tmp_path, UnconditionalTask(), Conditions(), name="plain")
    assert "reads 7 channels, and this run 4" in refusal(plain, source.config.run)
    assert begun(source, plain.config.run)[1]["new_inputs"] == "the small picture"


@pytest.mark.parametrize(
    ("task", "channels", "text"),
    [
        (UnconditionalTask(), 4, False),
        (SuperresTask(), 3, False),
        (InpaintTask(text=True), 4, True),
        (SemanticTask(), 4, False),
    ],
)
def test_folders_whose_autoencoder_has_taken_over_the_scale_tell_it(
    task: TaskConfig, channels: int, text: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    facts = Conditions(
        lowres=LowresFacts(factor=4, degradation="bicubic"), mask=MASKS.mask, labels=LabelFacts(count=5, grid=2)
    )
    made = make_task_run(tmp_path, task, facts, channels=channels, shift=0.3, text=text)
    folder = exported(made, tmp_path, "diffusers")
    capsys.readouterr()
    begun(made, folder)
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(WeightsError, match=r"latents of scale 0\.8 and shift 0\.3"):
        begun(replace(made, contract=replace(made.contract, scale=0.5)), folder)


@pytest.mark.parametrize("form", ["diffusers", "compvis"])
def test_a_table_of_class_vectors_is_refused_with_what_to_do(form: str, tmp_path: Path) -> None:
    """It is what two layers make of each class, which no one can undo."""
    made = make_task_run(tmp_path, ClassTask(mode="vector"), CLASSES)
    line = refusal(made, exported(made, tmp_path, form))
    assert "one table in place of the layers of our vector" in line and "begin with the run itself" in line
    assert begun(made, made.config.run)[1]["task"]["taken"]


def test_damaged_facts_of_a_task_are_refused_in_one_line(tmp_path: Path) -> None:
    made = make_task_run(tmp_path, InpaintTask(), MASKS)
    folder = Path(exported(made, tmp_path, "diffusers"))
    told = json.loads((folder / "task.json").read_text())
    for damage in ("[]", "{", json.dumps(told | {"conditions": {"mask": {"order": "reverse"}}})):
        (folder / "task.json").write_text(damage)
        assert "task.json" in refusal(made, folder)
