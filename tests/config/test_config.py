"""Configuration: what is given is what is got, and what cannot be meant is one line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from made.places import REPOSITORY
from pipeline import config as c
from pipeline.config.check.groups import check_world
from pipeline.config.check.verbs import CHECKS, check
from pipeline.config.loading.folders import conf_dir, groups
from pipeline.config.loading.load import load
from pipeline.config.loading.merge import flat_types, from_dict, to_dict, to_yaml
from pipeline.config.loading.overrides import quote
from pipeline.errors import ConfigError, OverrideError

TRAIN = ["run=runs/a", "data.train=cache"]
REQUIRED = {
    "synth": ["dest=d"],
    "fetch": ["dest=d"],
    "convert": ["from=classes", "images=i", "dest=d"],
    "encode": ["source=s", "dest=d"],
    "columns": ["dataset=c", "source=s", "dest=d", "caption_key=txt"],
    "index": ["dataset=d", "source=s"],
    "verify": ["dataset=d"],
    "reference": ["dataset=d"],
    "train": TRAIN,
    "autoencoder": TRAIN,
    "data": ["dataset=d"],
    "eval": ["run=r"],
    "reconstruct": ["dataset=d", "dest=d"],
    "sample": ["run=r"],
    "export": ["run=r", "dest=d"],
    "demo": [],
    "calibrate": [],
    "plan": [],
    "submit": [],
}


def refusal(verb: str, *overrides: str) -> str:
    """The line with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load(verb, [*REQUIRED[verb], *overrides])
    line = str(caught.value)
    assert "\n" not in line
    return line


def train(**changes: Any) -> c.TrainConfig:
    return dataclasses.replace(load("train", TRAIN), **changes)


@pytest.mark.parametrize("verb", sorted(c.CONFIGS))
def test_every_verb_loads_with_what_it_must_be_given(verb: str) -> None:
    config = load(verb, REQUIRED[verb])
    assert type(config) is c.CONFIGS[verb]
    assert c.CONFIGS[verb] in CHECKS


@pytest.mark.parametrize("verb", sorted(c.CONFIGS))
def test_a_configuration_survives_yaml(verb: str) -> None:
    config = load(verb, REQUIRED[verb])
    assert from_dict(c.CONFIGS[verb], yaml.safe_load(to_yaml(config))) == config
    assert from_dict(c.CONFIGS[verb], to_dict(config)) == config


def every_choice() -> list[tuple[str, str, str]]:
    return [(verb, group, name) for verb in c.CONFIGS for group, names in groups(verb).items() for name in names]


@pytest.mark.parametrize(("verb", "group", "name"), every_choice())
def test_every_packaged_choice_loads(verb: str, group: str, name: str) -> None:
    # sd1 and sd2 by themselves are wider than one small batch allows to check, but must load.
    path = conf_dir() / group / f"{name}.yaml"
    chosen = yaml.safe_load(path.read_text())
    no_context = group == "model" and chosen["context_width"] == 0
    more = ["task=unconditional"] if no_context else []
    if group == "task" and not c.TaskConfig.kinds()[name]().makes_context:
        more = ["model.context_width=0"]
    if group == "model" and chosen.get("vector_width"):  # no task gives such a vector and a context
        with pytest.raises(ConfigError, match="gives the UNet no vector beside the timestep"):
            load(verb, [*REQUIRED[verb], f"{group}={name}"])
        return
    if group == "guide":  # a choice names the kind of guide; where to is for the command line to say
        asked = {"image": ["guide.target=t.png"], "clip": ["prompt=p"], "classifier": ["guide.run=g", "class=[3]"]}
        more = (
            asked.get(name, [])
            if verb == "sample"
            else [word for word in asked.get(name, []) if word[:9] == "guide.run"]
        )
    if (verb, name) == ("autoencoder", "zero3"):
        assert "set deepspeed=zero2" in refusal(verb, "deepspeed=zero3")
        return
    load(verb, [*REQUIRED[verb], f"{group}={name}", *more])


def test_an_experiment_is_offered_to_its_verb_alone() -> None:
    offered = {verb: set(groups(verb)["experiment"]) for verb in ("train", "autoencoder")}
    assert "shapes" in offered["train"] and "kl_f8" in offered["autoencoder"]
    assert not offered["train"] & offered["autoencoder"]
    assert refusal("autoencoder", "experiment=shapes").startswith(
        "experiment=shapes: no such experiment; there are kl_"
    )


def test_every_yaml_file_is_reachable() -> None:
    reachable = {conf_dir() / f"{verb}.yaml" for verb in c.CONFIGS}
    reachable |= {conf_dir() / group / f"{name}.yaml" for _, group, name in every_choice()}
    assert set(conf_dir().rglob("*.yaml")) == reachable


def test_stable_diffusion_1_is_the_published_recipe() -> None:
    config = load("train", [*TRAIN, "experiment=sd1_256"])
    assert (config.optim.batch, config.optim.lr) == (2048, 1e-4)
    assert config.optim.warmup == 10_000 * 2048
    assert config.samples == 237_000 * 2048
    assert config.model.multipliers == (1, 2, 4, 4)
    assert (config.model.heads, config.model.context_width) == (8, 768)
    decay_per_step = 0.5 ** (config.optim.batch / config.ema.half_life)
    assert decay_per_step == pytest.approx(0.9999, abs=1e-6)
    encoders = load("encode", [*REQUIRED["encode"], "encoders=sd1"]).encoders
    assert (encoders.text_pad, encoders.text_length, encoders.text_layer) == (49407, 77, "last")


def test_a_group_and_a_key_beside_it_both_hold() -> None:
    config = load("train", [*TRAIN, "deepspeed.offload=true", "deepspeed=zero3", "optim=cosine", "optim.lr=2e-4"])
    assert (config.deepspeed.stage, config.deepspeed.offload) == (3, True)
    assert (config.optim.decay, config.optim.lr) == ("cosine", 2e-4)


def test_a_key_wins_over_an_experiment() -> None:
    config = load("train", [*TRAIN, "experiment=sd1_256", "optim.batch=64", "model=tiny", "optim.micro_batch=4"])
    assert (config.optim.batch, config.model.name, config.optim.lr) == (64, "tiny", 1e-4)


def test_numbers_and_lists_are_what_their_fields_say() -> None:
    assert load("train", [*TRAIN, "samples=1e6"]).samples == 1_000_000
    assert isinstance(load("train", [*TRAIN, "optim.lr=1"]).optim.lr, float)
    assert load("train", [*TRAIN, "model.multipliers=[1,2,4]"]).model.multipliers == (1, 2, 4)
    assert load("eval", ["run=r", "guidance=3"]).guidance == (3.0,)
    assert load("eval", ["run=r", "guidance=[1,2,3.5]"]).guidance == (1.0, 2.0, 3.5)
    several = [*REQUIRED["encode"], "conditions=[boxes,mask]", "boxes.count=3"]
    assert load("encode", several).conditions == ("boxes", "mask")
    assert load("sample", ["run=r"]).encoders is None
    assert load("sample", ["run=r", "encoders.name=sd1"]).encoders == c.EncodersConfig(name="sd1")


def test_a_folder_of_ones_own_adds_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my, conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /model: small\nsamples: 77\n"
    (tmp_path / "my, conf" / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path / "my, conf"))
    config = load("train", [*TRAIN, "experiment=mine"])
    assert (config.samples, config.model.name) == (77, "small")
    assert ", mine, sd1_256" in refusal("train", "experiment=other")
    monkeypatch.setenv("LATENTMILL_CONF", str(tmp_path / "absent"))
    assert "is not a folder" in refusal("train")


# --------------------------------------------------------------------------------------------------------------------
# Text


TEXTS = [
    "a large red circle left of a small blue square",
    "it's {00000..00009}, [a] (b) <c>; ~x ++y 100%",
    "${oc.env:HOME} $x \\${y} \\\\${z} \\",
    "a=b=c, d:e",
    "  'quoted' and \"double\"  ",
    "\\'",
    "null",
    "3",
    "",
    "многоцветный круг 赤い丸 🔴",
    "line\nbreak\ttab",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_caption_means_itself(text: str) -> None:
    assert load("sample", ["run=r", f"prompt={text}", "prompt=another"]).prompt == (text, "another")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_passes_hydras_grammar_unchanged(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    (override,) = OverridesParser.create().parse_overrides([f"++key={quote(text)}"])
    tree = OmegaConf.create({})
    OmegaConf.update(tree, "key", override.value())
    plain = OmegaConf.to_container(tree, resolve=True)
    assert plain == {"key": text}


@given(st.text("\\'\"${}a:,", max_size=12))
@settings(max_examples=200, deadline=None)
def test_text_of_nothing_but_special_characters_passes(text: str) -> None:
    test_any_text_passes_hydras_grammar_unchanged.hypothesis.inner_test(text)  # type: ignore[attr-defined]


def test_paths_keep_braces_and_equals_signs() -> None:
    config = load("encode", ["source=s3://b/a=1/{00000..00009}.tar", "dest=c, d/${x}"])
    assert (config.source, config.dest) == ("s3://b/a=1/{00000..00009}.tar", "c, d/${x}")


# --------------------------------------------------------------------------------------------------------------------
# Refusals


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    line = refusal("train", "optim.lrr=1")
    assert line.startswith("optim.lrr: no such key; did you mean optim.lr? (keys of optim: name, lr, betas,")
    assert "did you mean optim.lr?" in refusal("train", "lr=1")
    assert "did you mean data.train?" in refusal("train", "data.tran=x")
    assert "did you mean experiment?" in refusal("train", "experimnt=shapes")
    assert refusal("train", "zzz=1").startswith("zzz: no such key (keys: run, data, optim")
    assert "no such key" in refusal("synth", "model=tiny")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr=abc", "optim.lr=abc: a number is wanted"),
        ("optim.lr=true", "optim.lr=true: a number is wanted"),
        ("optim.lr=nan", "optim.lr=nan: a number is wanted"),
        ("optim.lr=null", "optim.lr=null: a number is wanted"),
        ("optim.batch=1.5", "optim.batch=1.5: a whole number is wanted"),
        ("optim.batch='64'", "optim.batch=64: a whole number is wanted"),
        ("deterministic=1", "deterministic=1: true or false is wanted"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: 2 values are wanted, as [a,b]"),
        ("model.multipliers=[1,x]", "model.multipliers=x: a whole number is wanted"),
        ("optim.decay=linear", "optim.decay=linear: there are constant, cosine"),
        ("deepspeed.stage=4", "deepspeed.stage=4: there are 0, 1, 2, 3"),
        ("deepspeed.stage=true", "deepspeed.stage=true: there are 0, 1, 2, 3"),
        ("model=sd3", "model=sd3: no such model; there are " + ", ".join(groups("train")["model"])),
        ("model.transformer_depth=[1,x]", "model.transformer_depth=x: a whole number is wanted"),
        ("model.transformer_depth=x", "model.transformer_depth=x: a whole number is wanted"),
        ("model.dropout=2", "model.dropout=2: a number from 0 to 1 is wanted"),
        ("samples=0", "samples=0: 1 or more is wanted"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(override: str, line: str) -> None:
    assert refusal("train", override) == line


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^run is missing: give run=\.\.\."):
        load("train", ["data.train=c"])
    with pytest.raises(ConfigError, match=r"data\.train is missing.*latentmill encode"):
        load("train", ["run=r"])


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim.lr=[1", "optim.lr=1,2", "optim.lr={a"])
def test_what_cannot_be_parsed_is_named_and_ends_with_2(override: str) -> None:
    with pytest.raises(OverrideError) as caught:
        load("train", [*TRAIN, override])
    assert override in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


SUPERRES = ("task=superres", "model.context_width=0", "model.in_channels=7")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=4", "model.head_width=32"], "set the other to 0"),
        (["model.heads=0"], "set the other to 0"),
        (["model.channels=60", "model.norm_groups=32"], "not a multiple of model.norm_groups=32"),
        (["model.heads=6"], "not a multiple of its heads"),
        (["model.context_width=0"], "model.context_width=0 takes none"),
        (["model.transformer_depth=0"], "model.transformer_depth=0: 1 or more"),
        (["model.transformer_depth=[1]"], "transformer_depth=[1]: one number for each of the 2 model.multipliers"),
        (["model.transformer_depth=[0,1]"], "level 0 attends, so 1 or more"),
        (["model.attention=[1]", "model.transformer_depth=[1,0]"], "level 1 attends"),
        (["model.vector_width=500", "model.vector_time_ids=2"], "more than model.vector_width=500"),
        (["optim.batch=63", "launch.processes=2"], "does not divide among 2 ranks; the nearest that does is 64"),
        (["optim.batch=64", "optim.micro_batch=48"], "does not divide the 64 samples of a rank"),
        (["deepspeed=zero0", "precision=bf16"], "precision=bf16 needs ZeRO stage >= 1"),
        (["deepspeed=zero3", "compile=true"], "compile=true goes with ZeRO stage 2 at most"),
        (["model.activation_gb=-1"], "model.activation_gb=-1: 0 or more is wanted"),
        (["deepspeed=zero0", "deepspeed.offload=true"], "deepspeed.offload=true needs ZeRO stage >= 1"),
        (["deepspeed=off", "launch.processes=2"], "launch.processes=1"),
        (["eval.reference=r"], "data.val is not"),
        (["data.val=cache"], "data.val=cache is the training cache"),
        (["eval.sampler.steps=2000"], "at most diffusion.timesteps=1000"),
        (["diffusion.beta_start=0.5"], "beta_start=0.5"),
        (["checkpoint.keep=0"], "checkpoint.keep=0"),
        (["checkpoint.keep_every=-1"], "checkpoint.keep_every=-1"),
        (
            ["checkpoint.best=psnr"],
            "is no figure of task=text: choose one of task, attribute_accuracy, clip_score, fid",
        ),
        (["task=unconditional", "model.context_width=0", "checkpoint.best=clip_score"], "no figure of task=uncond"),
        (["checkpoint.best=clip_score"], "goes by evaluations, and there are none: data.val=CACHE"),
        (["checkpoint.best=fid", "data.val=other"], "wants statistics of real images: eval.reference=FILE"),
        ([*SUPERRES, "checkpoint.best=st_lpips", "data.val=other"], "wants the weights of that distance"),
        (["eval.perceptual=st-alex", "data.val=other"], "with task=text, whose evaluations compare no pictures"),
        ([*SUPERRES, "eval.perceptual=", "data.val=other"], "eval.perceptual= is empty"),
        (["watchdog_s=-1"], "watchdog_s=-1: a number of seconds"),
        (["ema.half_lives=[0.5]"], "ema.half_lives=0.5: 1 or more is wanted"),
        (["ema.half_lives=[100,100]"], "ema.half_lives names one twice"),
        (["ema.widths=[0.5]", "ema.snapshots=10"], "ema.widths=0.5: a number above 0 and below 0.28 is wanted"),
        (["ema.widths=[0.1]"], "ema.widths=[0.1] with ema.snapshots=0: give both"),
        (["ema.snapshots=1000"], "ema.widths=[] with ema.snapshots=1000: give both"),
        (["guard.loss=0.5"], "guard.loss=0.5: a factor above 1 is wanted (0 = not looked at)"),
        (["guard.window=2"], "guard.window=2"),
        (["guard.most=0"], "guard.most=0"),
    ],
)
def test_contradictions_across_fields_are_refused(overrides: list[str], words: str) -> None:
    assert words in refusal("train", *overrides)


def test_a_batch_is_checked_against_the_world_that_a_launcher_made() -> None:
    check_world(c.OptimConfig(batch=64, micro_batch=4), 8)
    with pytest.raises(ConfigError, match="does not divide among 7 ranks; the nearest that does is 63"):
        check_world(c.OptimConfig(batch=64), 7)


def test_an_export_to_one_file_wants_a_files_name() -> None:
    assert "ends in .safetensors" in refusal("export", "format=compvis")
    load("export", ["run=r", "dest=m.safetensors", "format=compvis"])


# --------------------------------------------------------------------------------------------------------------------
# The dataclasses themselves


def test_every_field_has_a_docstring() -> None:
    from pipeline.config.loading.help import field_docs

    for cls in vars(c).values():
        if dataclasses.is_dataclass(cls) and isinstance(cls, type):
            assert {field.name for field in dataclasses.fields(cls)} == set(field_docs(cls)), cls


def test_a_field_whose_docstring_lists_words_has_them_as_choices() -> None:
    """Choices are `Literal`, so that a wrong one is refused with those there are."""
    literals = {key for cls in c.CONFIGS.values() for key, kind in flat_types(cls) if get_origin(kind) is Literal}
    assert {"resume", "precision", "optim.decay", "data.tail", "eval.sampler.sampler", "task.name"} <= literals
    assert all(len(get_args(kind)) >= 1 for cls in c.CONFIGS.values() for _, kind in flat_types(cls) if get_args(kind))


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("train", TRAIN).seed = 1


def test_no_field_is_a_secret() -> None:
    secret = re.compile(r"password|secret|token$|api_key|credential")
    assert [key for cls in c.CONFIGS.values() for key, _ in flat_types(cls) if secret.search(key)] == []


def test_check_refuses_what_from_dict_cannot_see() -> None:
    with pytest.raises(ConfigError):
        check(train(optim=c.OptimConfig(lr=-1.0)))


def test_conf_lies_at_the_top_of_the_checkout() -> None:
    assert conf_dir() == REPOSITORY / "conf"
