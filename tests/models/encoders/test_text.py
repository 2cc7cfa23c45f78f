"""models/encoders/text.py: ids and states equal transformers' CLIP, as Stable Diffusion 1 and 2 use it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import EncodersConfig
from pipeline.errors import ConfigError, WeightsError
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.models.encoders.tokenizer import load_tokenizer
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()

CAPTIONS = [
    "",
    "a large red circle left of a small blue square",
    "Un café à Kraków — ¿qué tal?",
    "日本語のキャプション 🎨 with emoji",
    "it's the dog's 2nd ball; they're 100% sure!!",
    "many words " * 60,
]
WIDTH, HEADS, DEPTH, EMBED = 32, 4, 3, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with CLIP's own vocabulary, in open_clip's layout."""
    where = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": EMBED,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": DEPTH},
    }
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (where / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": half}))
    return where


def tower(folder: Path, layer: Any, pad: int, length: int = 77) -> TextTower:
    return load_text(
        EncodersConfig(text=str(folder), text_layer=layer, text_pad=pad, text_length=length, seed=3),
    )


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer over the vocabulary that open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe
    from transformers import CLIPTokenizer

    where = tmp_path_factory.mktemp("vocabulary")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in SimpleTokenizer().encoder.items()}
    (where / "vocab.json").write_text(json.dumps(vocabulary))
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (where / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return CLIPTokenizer(str(where / "vocab.json"), str(where / "merges.txt"), model_max_length=77)


def as_transformers(ours: TextTower) -> Any:
    """transformers' CLIPTextModel with the weights of the tower."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        hidden_act="quick_gelu",
        projection_dim=EMBED,
        eos_token_id=49407,
        pad_token_id=1,
        bos_token_id=49406,
    )
    theirs = CLIPTextModelWithProjection(config).eval()
    mine = ours.model.state_dict()
    state = {
        "embeddings.token_embedding.weight": mine["token_embedding.weight"],
        "embeddings.position_embedding.weight": mine["positional_embedding"],
        "final_layer_norm.weight": mine["ln_final.weight"],
        "final_layer_norm.bias": mine["ln_final.bias"],
    }
    for i in range(DEPTH):
        block, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = mine[f"{block}attn.in_proj_{kind}"].chunk(3)
            state |= {f"{layer}self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", parts, strict=True)}
            for here, there in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                state[f"{layer}{there}.{kind}"] = mine[f"{block}{here}.{kind}"]
    full = {f"text_model.{name}": tensor for name, tensor in state.items()}
    full["text_projection.weight"] = mine["text_projection"].T
    missing, unexpected = theirs.load_state_dict(full, strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    return theirs


@pytest.mark.parametrize(("layer", "pad"), [("last", 49407), ("penultimate", 0)], ids=["sd1", "sd2"])
def test_ids_and_states_equal_transformers_clip(folder: Path, clip_tokenizer: Any, layer: str, pad: int) -> None:
    ours = tower(folder, layer, pad)
    theirs = as_transformers(ours)
    ids = ours.tokenize(CAPTIONS)
    clip_tokenizer.pad_token = "<|endoftext|>" if pad == 49407 else "!"
    expected = clip_tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(ids, expected.input_ids)
    with torch.no_grad():
        output = theirs(input_ids=ids, output_hidden_states=True)
        if layer == "last":
            states = output.last_hidden_state
        else:
            states = theirs.text_model.final_layer_norm(output.hidden_states[-2])
    torch.testing.assert_close(ours.encode(ids), states, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.pooled(ids), output.text_embeds, atol=2e-5, rtol=1e-4)
    assert ours.encode(ids).shape == (len(CAPTIONS), 77, WIDTH)


def test_padding_does_not_change_the_states_up_to_the_end_token(folder: Path) -> None:
    sd1, sd2 = tower(folder, "last", 49407), tower(folder, "last", 0)
    a, b = sd1.tokenize(["a red circle"]), sd2.tokenize(["a red circle"])
    assert a[0, :5].tolist() == b[0, :5].tolist()
    assert (a[0, 5:] == 49407).all()
    assert (b[0, 5:] == 0).all()
    torch.testing.assert_close(sd1.encode(a)[:, :5], sd2.encode(b)[:, :5])
    torch.testing.assert_close(sd1.pooled(a), sd2.pooled(b))


def test_pooled_and_states_are_open_clips_own(folder: Path) -> None:
    import open_clip

    ours = tower(folder, "last", 0)
    ids = open_clip.tokenize(CAPTIONS[1:])
    assert torch.equal(ours.tokenize(CAPTIONS[1:]), ids)
    with torch.no_grad():
        torch.testing.assert_close(ours.pooled(ids), ours.model.encode_text(ids))


def test_long_captions_are_cut_with_the_end_token_last_and_counted(folder: Path) -> None:
    ours = tower(folder, "last", 0, length=8)
    ids, count = ours.ids("one two three four five six seven eight")
    assert len(ids) == 8
    assert ids[0] == 49406
    assert ids[-1] == 49407
    assert count == 10
    fitting, count = ours.ids("one two three four five six")
    assert fitting[-1] == 49407
    assert count == 8


def test_a_shorter_context_gives_the_same_states(folder: Path) -> None:
    short, long = tower(folder, "last", 0, length=12), tower(folder, "last", 0)
    a = short.encode(short.tokenize(["a red circle"]))
    b = long.encode(long.tokenize(["a red circle"]))
    torch.testing.assert_close(a, b[:, :12])


def test_the_hash_tells_weights_apart_and_ignores_the_image_tower(folder: Path) -> None:
    config = EncodersConfig(text=str(folder), text_length=77, seed=3)
    ours, same = load_text(config), load_text(config)
    assert ours.weights_sha256 == same.weights_sha256
    with torch.no_grad():
        same.model.visual.conv1.weight.add_(1)
    again = TextTower(same.model, same.tokenizer, config, torch.device("cpu"))
    assert again.weights_sha256 == ours.weights_sha256
    assert again.image_sha256 != ours.image_sha256
    other = load_text(EncodersConfig(text=str(folder), text_length=77, seed=4))
    assert other.weights_sha256 != ours.weights_sha256


def test_images_of_any_size_are_embedded(folder: Path) -> None:
    ours = tower(folder, "last", 0)
    small = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(small), ours.model.encode_image(small))  # mean and std are 1/2
    assert ours.encode_image(torch.zeros(1, 3, 40, 40)).shape == (1, EMBED)


def test_the_shipped_tower_has_a_small_vocabulary_of_its_own() -> None:
    ours = load_text(EncodersConfig(seed=0))
    ids, count = ours.ids("a large red circle")
    assert count == 6
    assert ids[5] == ours.eot < 1024
    assert len(ids) == 32
    assert ours.encode(torch.tensor([ids])).shape == (1, 32, ours.width)


def test_wrong_towers_are_refused_with_a_reason(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="neither demo"):
        load_text(EncodersConfig(text="ViT-no-such"))
    with pytest.raises(WeightsError, match="missing or damaged"):
        load_text(EncodersConfig(text=str(folder), text_length=77))
    with pytest.raises(WeightsError, match="not an open_clip folder"):
        load_text(EncodersConfig(text=str(tmp_path), text_length=77))
    with pytest.raises(ConfigError, match="at most 77"):
        tower(folder, "last", 0, length=78)
    with pytest.raises(ConfigError, match="penultimate"):
        tower(folder, "first", 0)


def test_towers_that_are_not_clips_are_refused_before_anything_is_built(folder: Path, tmp_path: Path) -> None:
    for name in ("ViT-B-16-SigLIP", "xlm-roberta-base-ViT-B-32"):
        for load in (load_tokenizer, load_text):
            with pytest.raises(WeightsError, match="another tokenizer than CLIP's"):
                load(EncodersConfig(text=name, text_length=64, seed=0))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "bert-base-uncased"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="another tokenizer than CLIP's"):
        load_text(EncodersConfig(text=str(tmp_path), text_length=77, seed=0))
    with pytest.raises(WeightsError, match="CoCa"):
        load_text(EncodersConfig(text="coca_ViT-B-32", text_length=76, seed=0))
    with pytest.raises(WeightsError, match=r"'no-tag' is neither a file nor a tag of ViT-L-14, which has: openai"):
        load_text(EncodersConfig(text="ViT-L-14", text_pretrained="no-tag", text_length=77))
    with pytest.raises(ConfigError, match=r"text_pad=49407.*knows 637 tokens"):
        load_text(EncodersConfig(text_pad=49407, seed=0))


def test_towers_of_any_kind_give_open_clips_own_states(folder: Path, tmp_path: Path) -> None:
    """Also towers with a separate text module, and towers whose attention is not causal."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["custom_text"] = True
    config["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    ours = tower(tmp_path, "last", 0)
    ids = ours.tokenize(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(ours.pooled(ids), ours.model.encode_text(ids))


def test_the_activation_that_a_tag_was_trained_with_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's weights need the approximate GELU, which the name ViT-L-14 alone does not show."""
    from pipeline.models.encoders import text

    built: list[Any] = []

    def build(architecture: dict[str, Any], name: object, weights: object) -> Any:
        built.append(architecture["quick_gelu"])
        raise ZeroDivisionError

    monkeypatch.setattr(text, "_build", build)
    for name, tag in (("ViT-L-14", "openai"), ("ViT-H-14", "laion2b_s32b_b79k"), ("ViT-L-14-quickgelu", "")):
        with pytest.raises(ZeroDivisionError):
            load_text(EncodersConfig(text=name, text_pretrained=tag, text_length=77, seed=0))
    assert built == [True, False, True]
