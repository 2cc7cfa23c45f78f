import numpy as np
import pytest
import scipy.special
import torch

from pipeline import philox
from pipeline.philox import Stream

FULL = 0xFFFFFFFF
KNOWN = [  # Random123's published vectors of philox4x32-10: counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Held values: a run's randomness must not change from one release to the next.
WORDS = [[3873280023, 1189265143, 908915295]]
NORMALS = [-1.4793944358825684, 0.18155565857887268, -1.7209893465042114]
UNIFORM = 0.6350635100320735
FRACTION = 6203580374729837990
NUMBERS = [0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**62]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_random123s_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    in_numpy = philox.rounds_numpy([np.array([word], np.uint64) for word in counter], seed)
    in_torch = philox.rounds([torch.tensor([word]) for word in counter], seed)
    assert tuple(int(word[0]) for word in in_numpy) == expected
    assert tuple(int(word[0]) for word in in_torch) == expected


def test_words_are_the_ciphers_blocks_in_order():
    words = philox.words_numpy(7, Stream.NOISE, np.array([2**32 + 9], np.uint64), 6)
    for block, got in ((0, words[0, :4]), (1, words[0, 4:])):
        counter = [np.array([word], np.uint64) for word in (9, 1, int(Stream.NOISE), block)]
        assert list(got) == [int(word[0]) for word in philox.rounds_numpy(counter, 7)][: len(got)]


def test_numpy_and_torch_words_are_equal():
    for seed in (0, 1, 2**63 + 12345):
        in_numpy = philox.words_numpy(seed, Stream.SHUFFLE, np.array(NUMBERS, np.uint64), 11)
        in_torch = philox.words(seed, Stream.SHUFFLE, torch.tensor(NUMBERS), 11)
        assert in_numpy.dtype == np.uint32
        assert np.array_equal(in_numpy.astype(np.int64), in_torch.numpy())
        many = philox.NUMPY_BLOCKS // 2  # on a CPU, PyTorch's own operations take over beyond NUMPY_BLOCKS
        in_numpy = philox.words_numpy(seed, Stream.NOISE, np.array(NUMBERS, np.uint64), many)
        assert np.array_equal(in_numpy.astype(np.int64), philox.words(seed, Stream.NOISE, torch.tensor(NUMBERS), many))


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1,)])
def test_a_samples_normals_do_not_depend_on_the_batch(shape):
    n = torch.arange(37) + 1000
    whole = philox.normal(3, Stream.NOISE, n, shape)
    for size in (1, 2, 5, 36):
        parts = torch.cat([philox.normal(3, Stream.NOISE, part, shape) for part in n.split(size)])
        assert torch.equal(whole, parts)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(philox.normal(3, Stream.NOISE, n[order], shape), whole[order])


def test_normals_are_box_muller_of_the_words():
    n = torch.arange(64)
    words = philox.words(0, Stream.NOISE, n, 256).numpy()
    radius = np.sqrt(-2 * np.log((words[:, 0::2] + 0.5) / 2**32))
    angle = 2 * np.pi * words[:, 1::2] / 2**32 - np.pi
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(64, 256)
    assert np.abs(philox.normal(0, Stream.NOISE, n, (256,)).numpy() - expected).max() < 5e-7


def test_normals_of_the_extreme_words_are_finite_and_right():
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    logs = philox.log_fraction(words).numpy()
    assert np.allclose(logs, np.log((words.numpy() + 0.5) / 2**32), rtol=1e-10, atol=0)
    sine, cosine = philox._sine_cosine(words)
    angle = 2 * np.pi * words.numpy() / 2**32 - np.pi
    assert np.abs(sine.numpy() - np.sin(angle)).max() < 1e-10
    assert np.abs(cosine.numpy() - np.cos(angle)).max() < 1e-10


def test_normal_quantiles_are_the_inverse_of_the_normal_distribution():
    words = torch.tensor([0, 1, 1000, 2**28, 322122547, 322122548, 2**31 - 1, 2**31, 2**31 + 7, 2**32 - 2, 2**32 - 1])
    words = torch.cat([words, torch.arange(0, 2**32, 10_000_019)])
    expected = scipy.special.ndtri((words.numpy() + 0.5) / 2**32)
    z = philox.normal_quantile(words)
    assert np.allclose(z.numpy(), expected, rtol=1e-9, atol=1e-15)
    assert torch.equal(z, -philox.normal_quantile(2**32 - 1 - words))
    assert z.abs().max() < 6.34


def test_exponentials_are_those_of_the_library():
    x = torch.linspace(-80, 80, 100_001, dtype=torch.float64)
    assert np.allclose(philox.exponential(x).numpy(), np.exp(x.numpy()), rtol=3e-14, atol=0)
    assert torch.equal(philox.exponential(torch.tensor([0.0, -1e9], dtype=torch.float64))[:1], torch.ones(1).double())


def test_quantiles_and_exponentials_do_not_depend_on_their_batch():
    words = philox.words(0, Stream.TIMESTEP, torch.arange(37), 1)[:, 0]
    whole = philox.normal_quantile(words)
    for i in range(37):
        assert torch.equal(philox.normal_quantile(words[i : i + 1]), whole[i : i + 1])
        assert torch.equal(philox.exponential(whole[i : i + 1]), philox.exponential(whole)[i : i + 1])


def test_normals_have_the_moments_of_a_standard_normal():
    z = philox.normal(1, Stream.POSTERIOR, torch.arange(200), (1000,)).double()
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.1
    assert abs((z[:, 0::2] * z[:, 1::2]).mean()) < 0.01  # the two of one Box-Muller pair


def test_streams_and_seeds_are_unrelated():
    n = torch.arange(50)
    a = philox.normal(0, Stream.NOISE, n, (1000,))
    for b in (philox.normal(0, Stream.POSTERIOR, n, (1000,)), philox.normal(1, Stream.NOISE, n, (1000,))):
        assert abs((a * b).mean()) < 0.02


def test_values_never_change_between_releases():
    assert [int(stream) for stream in Stream] == list(range(15))
    assert philox.words(42, Stream.FLIP, torch.tensor([123456789]), 3).tolist() == WORDS
    assert philox.normal(42, Stream.NOISE, torch.tensor([7]), (3,)).tolist() == [NORMALS]
    assert philox.uniform(42, Stream.DROPOUT, torch.tensor([7])).item() == UNIFORM
    assert philox.stratified_uniform(42, torch.tensor([7]))[0].item() == FRACTION


def test_uniforms_are_multiples_of_2_to_the_minus_53_and_cover_the_interval():
    u = philox.uniform(0, Stream.DROPOUT, torch.arange(20_000), 2)
    assert u.dtype == torch.float64
    assert u.shape == (20_000, 2)
    assert torch.equal(u * 2**53, (u * 2**53).floor())
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u.float(), bins=10, min=0, max=1)
    assert (counts / u.numel() - 0.1).abs().max() < 0.01


def test_stratified_uniforms_are_the_exact_golden_ratio_sequence():
    n = torch.tensor([0, 1, 2, 1000, 2**40])
    fractions, u = philox.stratified_uniform(5, n)
    start = int(fractions[0]) % 2**64
    for i, fraction, value in zip(n.tolist(), fractions.tolist(), u.tolist(), strict=True):
        assert fraction % 2**64 == (start + i * philox.GOLDEN) % 2**64
        assert value == ((fraction % 2**64) >> 11) / 2**53
    assert int(philox.stratified_uniform(6, n)[0][0]) != int(fractions[0])


@pytest.mark.parametrize("first", [0, 12345, 2**40])
def test_stratified_uniforms_of_consecutive_samples_are_evenly_spread(first):
    ordered = philox.stratified_uniform(0, torch.arange(64) + first)[1].sort().values
    gaps = torch.cat([ordered[1:], ordered[:1] + 1]) - ordered
    assert gaps.max() < 2.7 / 64  # three-distance theorem; 64 independent uniforms leave gaps of about 4.7 / 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_words_and_fractions_are_bit_exact_on_a_gpu_and_normals_to_1e_6():
    n = torch.tensor(NUMBERS)
    assert torch.equal(philox.words(3, 1, n, 9, device="cuda").cpu(), philox.words(3, 1, n, 9))
    assert torch.equal(philox.stratified_uniform(3, n.cuda())[0].cpu(), philox.stratified_uniform(3, n)[0])
    on_gpu = philox.normal(3, Stream.NOISE, n.cuda(), (4, 64, 64))
    assert torch.equal(on_gpu[2:3], philox.normal(3, Stream.NOISE, n[2:3].cuda(), (4, 64, 64)))
    assert (on_gpu.cpu() - philox.normal(3, Stream.NOISE, n, (4, 64, 64))).abs().max() < 1e-6
