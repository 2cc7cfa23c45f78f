"""Figures of reconstructions against computations by hand, over worlds, batches and kinds of first stages."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from made.autoencoder_run import KL, SIDE, VQ, autoencoder_config, make_module, make_pixels, picture
from made.real_pictures import network, with_reference
from made.thread_world import on_ranks
from pipeline.config import FirstStageConfig
from pipeline.distributed.world import World
from pipeline.errors import ContractMismatch, Interrupted, ShapeError
from pipeline.evaluation.metrics.error_bars import half_sample_error
from pipeline.evaluation.metrics.fid import Statistics, fid
from pipeline.evaluation.metrics.restoration import ssim
from pipeline.evaluation.reconstruction.card import OF_THE_MACHINE
from pipeline.evaluation.reconstruction.counted import Counted
from pipeline.evaluation.reconstruction.evaluate import Reconstructing, Reconstructions
from pipeline.evaluation.reconstruction.pairs import Pair, drawn, of_one_size
from pipeline.evaluation.reconstruction.pictures import Pictures
from pipeline.evaluation.reconstruction.stage import stage_of
from pipeline.inference.pictures import from_uint8, to_uint8
from pipeline.models.encoders.first_stage import FirstStage, Identity, VQStage
from pipeline.models.perceptual.network import Kind, Perceptual
from pipeline.report.grid import MARGIN

SIZES = [7, 0, 5, 3]
IMAGES = 13
ORDER = [(unit, row) for unit, size in enumerate(SIZES) for row in range(size)][:IMAGES]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    folder = tmp_path_factory.mktemp("pictures")
    make_pixels(str(folder / "pixels"), SIZES)
    return Pictures.at(str(folder / "pixels"), "dataset")


def stage(architecture: FirstStageConfig) -> FirstStage:
    module = make_module(autoencoder_config(Path("none"), architecture))
    return stage_of(architecture, {name: tensor.detach() for name, tensor in module.named_parameters()})


def truth() -> np.ndarray:
    """The first pictures of the cache, (IMAGES, SIDE, SIDE, 3) uint8."""
    return np.stack([picture(unit, row).transpose(1, 2, 0) for unit, row in ORDER])


def same(result: Reconstructions) -> dict[str, Any]:
    """Figures without times."""
    return {name: value for name, value in result.metrics.items() if name not in OF_THE_MACHINE}


def test_figures_of_pictures_are_those_computed_by_hand(pictures: Pictures) -> None:
    kl = stage(KL)
    metrics = Reconstructing(pictures, batch=4)(kl, 128, images=IMAGES, weights="ema").metrics
    made = to_uint8(kl.decode(kl.mean(from_uint8(truth()))))
    errors = np.square(made.astype(float) - truth()).reshape(IMAGES, -1).mean(axis=1)
    psnrs = 10 * np.log10(255**2 / errors)
    similar = [ssim(a, b) for a, b in zip(made, truth())]
    assert metrics["psnr"] == pytest.approx(psnrs.mean(), abs=0.02)  # rounding of levels differs between batches
    assert metrics["psnr_error"] == pytest.approx(psnrs.std(ddof=1) / math.sqrt(IMAGES), rel=0.02)
    assert metrics["ssim"] == pytest.approx(np.mean([value for value in similar if value is not None]), abs=1e-3)
    assert (metrics["n"], metrics["images"], metrics["weights"]) == (128, IMAGES, "ema")
    assert "st_lpips" not in metrics and "codes_used" not in metrics and "bits_per_pixel" not in metrics
    assert metrics["encode_images_per_s"] > 0 and metrics["decode_images_per_s"] > 0


def test_figures_of_a_posterior_are_those_computed_by_hand(pictures: Pictures) -> None:
    kl = stage(KL)
    metrics = Reconstructing(pictures, batch=4)(kl, images=IMAGES).metrics
    mean, logvar = kl.encode(from_uint8(truth())).double().chunk(2, dim=1)
    posterior = Normal(mean, (0.5 * logvar).exp())
    nats = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(dim=(1, 2, 3))
    bits = nats / math.log(2) / SIDE**2
    assert metrics["kl_bits_per_pixel"] == pytest.approx(float(bits.mean()), rel=1e-5)
    assert metrics["kl_bits_per_pixel_error"] == pytest.approx(float(bits.std()) / math.sqrt(IMAGES), rel=1e-4)
    assert metrics["posterior_std"] == pytest.approx(float(posterior.stddev.mean()), rel=1e-5)
    assert metrics["latent_std"] == pytest.approx(float(mean.std(correction=0)), rel=1e-5)
    assert metrics["latent_mean"] == pytest.approx(float(mean.mean()), abs=1e-6)
    for channel in range(3):
        values = mean[:, channel]
        assert metrics["latent_mean_by_channel"][str(channel)] == pytest.approx(float(values.mean()), abs=1e-6)
        assert metrics["latent_std_by_channel"][str(channel)] == pytest.approx(
            float(values.std(correction=0)), rel=1e-5
        )
    expected = half_sample_error(IMAGES, lambda numbers: float(mean[numbers].std(correction=0)))
    assert metrics["latent_std_error"] == pytest.approx(expected, rel=1e-4)
    assert metrics["stored_bits_per_pixel"] == 16 * 2 * 3 / 2**2  # mean and log-variance, float16, f = 2


def test_codes_are_counted_over_all_pictures_and_not_by_batch(pictures: Pictures) -> None:
    vq = stage(VQ)
    assert isinstance(vq, VQStage)
    latents = vq.encode(from_uint8(truth())).permute(0, 2, 3, 1).reshape(-1, 3)
    vq.codebook.copy_(latents[torch.from_numpy(np.random.default_rng(0).permutation(len(latents))[: VQ.codes])])
    vq.codebook[0] = 1000.0  # that no latent chooses
    evaluated = Reconstructing(pictures, batch=2)(vq, images=IMAGES)
    indices = vq.nearest(vq.encode(from_uint8(truth()))).numpy()

    def perplexity(chosen: np.ndarray) -> float:
        share = np.unique(chosen, return_counts=True)[1] / chosen.size
        return float(np.exp(-(share * np.log(share)).sum()))

    def usage(chosen: np.ndarray) -> float:
        return len(np.unique(chosen)) / VQ.codes

    by_batch = np.mean([perplexity(indices[i : i + 2]) for i in range(0, IMAGES, 2)])
    metrics = evaluated.metrics
    assert metrics["perplexity"] == pytest.approx(perplexity(indices), rel=1e-9)
    assert metrics["perplexity"] > 1.2 * by_batch, "the mean over batches would be taken for it"
    assert metrics["codes_used"] == usage(indices) and usage(indices) < 1
    for name, of in (("perplexity", perplexity), ("codes_used", usage)):
        expected = half_sample_error(IMAGES, lambda numbers, of=of: of(indices[numbers.numpy()]))  # type: ignore[misc]
        assert metrics[f"{name}_error"] == pytest.approx(expected, rel=1e-9)
    assert metrics["bits_per_pixel"] == pytest.approx(math.log2(20) / 4**2)
    assert metrics["stored_bits_per_pixel"] == 16 * 3 / 4**2  # what is cached is not quantised
    assert not {"kl_bits_per_pixel", "posterior_std"} & metrics.keys()
    assert evaluated.card.autoencoder == {
        "architecture": "VQModel", "downsampling": 4, "channels": 3, "codes": 20, "dtype": "float32",
    }  # fmt: skip


def test_what_is_decoded_of_a_codebook_are_its_codes(pictures: Pictures) -> None:
    vq = stage(VQ)
    assert isinstance(vq, VQStage)
    kept = Reconstructing(pictures, batch=IMAGES, most_pairs=IMAGES)(vq, images=IMAGES).pairs
    made = to_uint8(vq.decode(vq.quantise(vq.encode(from_uint8(truth())))))
    for pair in kept:
        assert np.abs(pair.reconstruction.astype(int) - made[pair.number]).max() <= 1


def test_pixels_themselves_are_equal_pictures_and_take_24_bits_each(pictures: Pictures) -> None:
    result = Reconstructing(pictures, batch=4)(Identity(), images=IMAGES)
    assert (result.metrics["psnr"], result.metrics["ssim"], result.metrics["stored_bits_per_pixel"]) == (100, 1, 24)
    assert result.card.autoencoder["architecture"] == "pixels"


@pytest.mark.parametrize("architecture", [KL, VQ], ids=["kl", "vq"])
def test_any_world_makes_the_same_figures_and_pairs(pictures: Pictures, architecture: FirstStageConfig) -> None:
    made = {"batch": 2, "most_pairs": 4, **with_reference(pictures.contract)}
    first = stage(architecture)
    alone = Reconstructing(pictures, **made)(first, images=IMAGES)
    shares: list[list[int]] = []

    def act(world: World) -> Reconstructions:
        reconstructing = Reconstructing(pictures, **made, world=world)
        measure = reconstructing._measure
        reconstructing._measure = lambda *given: noted(measure(*given))  # type: ignore[method-assign]
        return reconstructing(first, images=IMAGES)

    def noted(counted: Counted) -> Counted:
        shares.append(sorted(counted.rows))
        return counted

    for together in on_ranks(3, act):
        assert isinstance(together, Reconstructions), together
        assert same(together) == same(alone)
        assert [(pair.psnr, pair.key) for pair in together.pairs] == [(pair.psnr, pair.key) for pair in alone.pairs]
        np.testing.assert_array_equal(together.grid, alone.grid)
    assert len(shares) == 3 and all(shares) and sorted(n for share in shares for n in share) == list(range(IMAGES))


def test_batches_change_figures_by_rounding_only(pictures: Pictures) -> None:
    first, second = (Reconstructing(pictures, batch=batch)(stage(KL), images=IMAGES) for batch in (3, 64))
    assert first.metrics["psnr"] == pytest.approx(second.metrics["psnr"], abs=0.02)
    assert first.metrics["latent_std"] == pytest.approx(second.metrics["latent_std"], rel=1e-5)


def test_the_worst_pairs_come_first_with_their_records_keys(pictures: Pictures) -> None:
    kl = stage(KL)
    result = Reconstructing(pictures, batch=3, most_pairs=5)(kl, images=IMAGES)
    everything = Reconstructing(pictures, batch=3, most_pairs=IMAGES)(kl, images=IMAGES).pairs
    assert sorted(pair.number for pair in everything) == list(range(IMAGES))
    assert [pair.psnr for pair in everything] == sorted(pair.psnr for pair in everything)
    assert [pair.key for pair in result.pairs] == [pair.key for pair in everything[:5]]
    for pair in everything:
        unit, row = ORDER[pair.number]
        assert pair.key == f"{unit:06d}_{row:06d}"
        np.testing.assert_array_equal(pair.picture, picture(unit, row).transpose(1, 2, 0))
    assert np.mean([pair.psnr for pair in everything]) == pytest.approx(result.metrics["psnr"])
    assert result.captions[0] == f"{result.pairs[0].key}: {result.pairs[0].psnr:.1f} dB"
    assert result.grid.shape == (5, SIDE, SIDE, 3) == np.asarray(result.shown).shape


def test_rfid_is_the_fid_of_the_reconstructions_against_real_pictures(pictures: Pictures) -> None:
    given = with_reference(pictures.contract)
    kl = stage(KL)
    result = Reconstructing(pictures, batch=4, most_pairs=IMAGES, **given)(kl, images=IMAGES)
    made = np.stack([pair.reconstruction for pair in sorted(result.pairs, key=lambda pair: pair.number)])
    expected = fid(Statistics.of(network(made)).gaussian(), given["reference"].gaussian)
    assert result.metrics["rfid_democlip"] == pytest.approx(expected, rel=1e-9)
    assert result.metrics["rfid_democlip_error"] > 0
    real = given["reference"].floors(IMAGES)
    assert result.metrics["rfid_democlip_floor_real"] == real["real"]
    assert result.metrics["rfid_democlip_floor_images"] == 10
    assert result.card.reference is not None and result.card.rank_deficient is False
    assert f"rfid_democlip {expected:.3g}" in result.card.line()
    assert "rfid_democlip_floor_reconstruction" not in result.metrics, "it would be of another autoencoder"


def test_a_reference_of_other_pictures_is_refused_and_one_of_any_autoencoder_is_taken(pictures: Pictures) -> None:
    with pytest.raises(ContractMismatch, match=r"resolution 32, not 16"):
        Reconstructing(pictures, **with_reference(pictures.contract, resolution=32))
    Reconstructing(pictures, **with_reference(pictures.contract, vae_sha256="another"))


def test_pictures_that_are_in_the_reference_are_warned_of(
    pictures: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    made = with_reference(pictures.contract, dataset=pictures.manifest.digest)
    Reconstructing(pictures, **made)(Identity(), images=10)
    assert "is too good" not in capsys.readouterr().err
    Reconstructing(pictures, **made)(Identity(), images=11)
    assert "rFID of 11 is too good; images=10 is fair" in capsys.readouterr().err


def test_reconstructions_that_are_not_finite_are_counted(pictures: Pictures) -> None:
    kl = stage(KL)
    kl.model.quant_conv.bias.data[0] = math.nan  # type: ignore[attr-defined]
    metrics = Reconstructing(pictures, batch=4)(kl, images=5).metrics
    assert metrics["images_not_finite"] == 5 and math.isnan(metrics["latent_std"])


def test_an_evaluation_that_is_asked_to_stop_leaves_before_its_next_batch(pictures: Pictures) -> None:
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        Reconstructing(pictures, batch=4)(Identity(), images=IMAGES, stopped=lambda: next(asked))


def test_more_pictures_than_there_are_is_all_of_them(pictures: Pictures) -> None:
    result = Reconstructing(pictures, batch=4)(Identity(), images=1000)
    assert (result.metrics["images"], result.card.pictures["records"]) == (15, 15)


def test_sizes_that_the_autoencoder_does_not_take_are_one_line(tmp_path: Path) -> None:
    make_pixels(str(tmp_path / "odd"), [2], side=18)
    odd = Pictures.at(str(tmp_path / "odd"), "dataset")
    with pytest.raises(ContractMismatch) as caught:
        Reconstructing(odd)(stage(VQ), images=2)
    assert str(caught.value) == (
        f"dataset={tmp_path / 'odd'} has pictures of 18 x 18 pixels, and the autoencoder takes multiples of 4: encode "
        "them with such a resolution"
    )


def test_pictures_that_are_too_small_for_the_distance_are_refused_before_any_work(pictures: Pictures) -> None:
    with pytest.raises(ShapeError, match="32 pixels or more"):
        Reconstructing(pictures, perceptual=Perceptual("alex"))


@pytest.mark.parametrize(
    ("kind", "figure", "title"), [("alex", "st_lpips", "st-LPIPS by st-alex"), ("lpips-vgg", "lpips", "LPIPS by lpips")]
)
def test_the_distance_is_the_mean_over_pictures_under_the_name_of_its_kind(
    tmp_path: Path, kind: Kind, figure: str, title: str
) -> None:
    make_pixels(str(tmp_path / "larger"), [3], side=32)
    larger = Pictures.at(str(tmp_path / "larger"), "dataset")
    torch.manual_seed(0)
    distance = Perceptual(kind)
    for parameter in distance.parameters():
        parameter.data.normal_().mul_(0.05).abs_()
    kl = stage(KL)
    result = Reconstructing(larger, perceptual=distance)(kl, images=3)
    x, y = (np.stack([getattr(pair, name) for pair in result.pairs]) for name in ("picture", "reconstruction"))
    expected = distance.distance(from_uint8(y), from_uint8(x))
    assert result.metrics[figure] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert {name for name in result.metrics if "lpips" in name} == {figure, f"{figure}_error"}
    assert result.card.perceptual == {"name": distance.name, "sha256": distance.sha256}
    assert f"; {title}" in result.card.line()


def test_batches_are_cut_within_a_shard_and_cover_each_picture_once(pictures: Pictures) -> None:
    cuts = pictures.cuts(IMAGES, 4)
    assert [(cut.first, cut.shard, len(cut.rows)) for cut in cuts] == [
        (0, 0, 4),
        (4, 0, 3),
        (7, 2, 4),
        (11, 2, 1),
        (12, 3, 1),
    ]
    numbers = [number for batch in pictures.read(cuts) for number in batch.numbers]
    assert numbers == list(range(IMAGES))


def test_pairs_of_several_sizes_are_shown_on_paper_of_the_largest() -> None:
    wide, high = np.zeros((8, 16, 3), np.uint8), np.full((12, 4, 3), 9, np.uint8)
    sheets = of_one_size([wide, high])
    assert sheets.shape == (2, 12, 16, 3)
    assert (sheets[0, :8] == 0).all() and (sheets[1, :, :4] == 9).all() and (sheets[0, 8:] > 9).all()
    picture = drawn([Pair(20.0, 0, "a\nb", wide, wide), Pair(21.0, 1, "c" * 200, high, high)])
    assert picture.size[0] > 2 * 128 and picture.size[1] > 96
    pixels = np.asarray(picture)
    assert (pixels[MARGIN : MARGIN + 8 * 8, MARGIN : MARGIN + 16 * 8] == 0).all(), "pixels are enlarged as they are"


def test_every_size_of_a_cache_is_looked_at_before_the_first_picture(pictures: Pictures) -> None:
    contract = replace(pictures.contract, buckets=((16, 16), (20, 12)))
    several = Pictures(pictures.storage, replace(pictures.manifest, contract=contract), "dataset=several")
    several.require_sizes(4)
    assert several.smallest == 12
    with pytest.raises(ContractMismatch, match="dataset=several has pictures of 20 x 12 pixels"):
        several.require_sizes(8)
