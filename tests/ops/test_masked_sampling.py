# SPDX-License-Identifier: Apache-2.0
"""Masked decoding against the float64 reference, with the same noise, and as a distribution."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2p_fast import reference
from t2p_fast.ops import MaskedSample, mask_counts, masked_sample
from t2p_fast.reference.masked_sampling import confidence_noise, philox, token_noise

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def _case(b: int, n: int, v: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, ...]:
    """Logits, unconditional logits, tokens of which a third is known, and seeds."""
    generator = torch.Generator().manual_seed(seed)
    logits, uncond = (scale * torch.randn(b, n, v, generator=generator) for _ in range(2))
    tokens = torch.randint(0, v, (b, n), generator=generator)
    tokens[torch.rand(b, n, generator=generator) < 2 / 3] = v
    return logits, uncond, tokens, torch.randint(-(2**63), 2**63 - 1, (b,), generator=generator)


def _log_probability_tolerance(logits: Tensor, guidance: float) -> float:
    # The rounding of x, of the exponentials and of their sums of 16 groups, and of the result.
    return float(logits.abs().max()) * (1 + 2 * abs(guidance)) * 2.0**-22 + 24 * 2.0**-23


def test_philox_gives_the_published_words() -> None:
    """The known answers of Random123, and through them the noise of the kernels."""
    zero, pi = torch.zeros(1).long(), torch.tensor([0x243F6A88])
    words = philox(zero, zero, zero, 0, 0)[:, 0]
    assert [f"{int(w):08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    key = torch.tensor([0x299F31D0A4093822])
    words = philox(key, pi, torch.tensor([0x85A308D3]), 0x13198A2E, 0x03707344)[:, 0]
    assert [f"{int(w):08x}" for w in words] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(0, 3),
    n=st.integers(0, 20),
    v=st.sampled_from([1, 2, 15, 16, 63, 64, 65, 200, 1025]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    guidance=st.sampled_from([0.0, 1.5, -0.5, 9.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    choice_temperature=st.sampled_from([0.0, 1.0, 4.5]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    top_k=st.sampled_from([0, 1, 7, 64, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_masked_sample_is_that_of_the_reference(
    b: int, n: int, v: int, scale: float, guidance: float, temperature: float,
    choice_temperature: float, min_p: float, top_k: int, dtype: torch.dtype, seed: int,
    device: torch.device,
) -> None:  # fmt: skip
    logits, uncond, tokens, seeds = (t.to(device) for t in _case(b, n, v, seed, scale))
    logits, uncond = logits.to(dtype), uncond.to(dtype)
    count = (tokens == v).sum(1) // 2
    options = {
        "mask_count": count, "guidance": guidance, "temperature": temperature, "min_p": min_p,
        "top_k": top_k, "choice_temperature": choice_temperature, "step": seed,
    }  # fmt: skip
    ours = masked_sample(logits, tokens, uncond_logits=uncond, seed=seeds, **options)
    # x in float32, as promised; all else in float64. In float32 near ties of x are exact ties.
    truth = reference.masked_sample(
        logits.float(), tokens, uncond_logits=uncond.float(), seeds=seeds, **options
    )
    assert torch.equal(ours.sampled, truth.sampled)
    tolerance = _log_probability_tolerance(logits.float(), guidance) if logits.numel() else 0
    torch.testing.assert_close(ours.log_probability, truth.log_probability.float(), rtol=1e-6,
                               atol=tolerance)  # fmt: skip
    known = tokens != v
    assert torch.equal(ours.sampled[known], tokens[known])
    assert (ours.log_probability[known] == 0).all()
    again = ours.tokens == v
    assert torch.equal(again.sum(1), count)
    assert not (again & known).any()
    assert torch.equal(ours.tokens[~again], ours.sampled[~again])
    # Nobody who stays is less confident than somebody who goes, but for the rounding of log p.
    noise = confidence_noise(seeds, n, seed)
    confidence = ours.log_probability.double() + choice_temperature * noise
    for i in range(b):
        gone, kept = confidence[i][again[i]], confidence[i][~again[i] & ~known[i]]
        if len(gone) and len(kept):
            assert float(gone.max()) <= float(kept.min())


@pytest.mark.parametrize("v", [5, 8192])
def test_given_noise_is_used(v: int, device: torch.device) -> None:
    logits, uncond, tokens, seeds = (t.to(device) for t in _case(2, 30, v))
    noise = token_noise(seeds, 30, v, 2).float(), confidence_noise(seeds, 30, 2).float()
    options = {"mask_count": torch.tensor([3, 9], device=device), "choice_temperature": 2.0,
               "uncond_logits": uncond, "guidance": 1.0}  # fmt: skip
    given_noise = masked_sample(logits, tokens, noise=noise, **options)
    truth = reference.masked_sample(logits, tokens, noise=noise, **options)
    assert torch.equal(given_noise.sampled, truth.sampled)
    assert torch.equal(given_noise.tokens, truth.tokens)


@pytest.mark.not_emulated(reason="forty thousand draws")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("by_step", [False, True])
def test_tokens_follow_the_softmax(temperature: float, by_step: bool, device: torch.device) -> None:
    """Chi-square over positions and seeds, and over the steps of one seed."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5], device=device)
    many = logits.expand(2, 500, 5)
    masked = torch.full((2, 500), 5, device=device)
    drawn = [
        masked_sample(
            many,
            masked,
            temperature=temperature,
            seed=3 if by_step else 2 * i,
            step=i if by_step else 0,
        )
        for i in range(40)
    ]
    tokens = torch.stack([d.sampled for d in drawn]).flatten()
    expected = (logits / temperature).softmax(0) * len(tokens)
    chi_square = ((tokens.bincount(minlength=5) - expected) ** 2 / expected).sum()
    assert float(chi_square) < 18.47  # 99.9 % of the chi-square distribution of 4 degrees
    # Confidences are at temperature 1, as in MaskGIT.
    torch.testing.assert_close(drawn[0].log_probability, logits.log_softmax(0)[drawn[0].sampled])


@pytest.mark.not_emulated(reason="six million words")
def test_words_of_a_position_do_not_hang_together(device: torch.device) -> None:
    """Over a vocabulary of some groups every word comes up as often, also in pairs of positions."""
    v, n = 150, 40_000
    uniform = torch.zeros(1, 1, 1, device=device).expand(1, n, v)
    tokens = masked_sample(uniform, torch.full((1, n), v, device=device), seed=11).sampled[0]
    single = tokens.bincount(minlength=v).double()
    assert float(((single - n / v) ** 2 / (n / v)).sum()) < 208  # 99.9 %, 149 degrees
    pairs = (tokens[::2] // 15 * 10 + tokens[1::2] // 15).bincount(minlength=100).double()
    assert float(((pairs - n / 200) ** 2 / (n / 200)).sum()) < 149  # 99.9 %, 99 degrees


@pytest.mark.not_emulated(reason="up to 4096 positions in 12 rounds")
@pytest.mark.parametrize(
    ("n", "counts"),
    [
        (256, "251 236 212 181 142 97 49 1"),
        (256, "253 247 236 221 203 181 155 128 97 66 33 1"),
        (256, "255 252 247 240 232 221 209 196 181 164 146 128 108 87 66 44 22 1"),
        (4096, "4017 3784 3405 2896 2275 1567 799 1"),
    ],
)
def test_decoding_keeps_the_counts_of_maskgit(n: int, counts: str, device: torch.device) -> None:
    expected = [int(count) for count in counts.split()]
    steps, start = len(expected), torch.tensor([n], device=device)
    tokens, made = torch.full((1, n), 7, device=device), []
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        logits = torch.randn(1, n, 7, generator=generator).to(device)
        count = mask_counts(step, steps, start, (tokens == 7).sum(1))
        before, tokens = (
            tokens,
            masked_sample(
                logits, tokens, mask_count=count, choice_temperature=4.5, seed=1, step=step
            ).tokens,
        )
        assert torch.equal(tokens[before != 7], before[before != 7])
        made.append(int((tokens == 7).sum()))
    assert made == expected


def test_mask_counts_linear_and_errors() -> None:
    start = torch.tensor([100])
    assert int(mask_counts(0, 4, start, start, schedule="linear")) == 75
    with pytest.raises(ValueError, match="mask_counts: schedule='exp' is not supported"):
        mask_counts(0, 4, start, start, schedule="exp")


def test_two_spellings_of_guidance(device: torch.device) -> None:
    """``(1 + t) c - t u`` of Muse and ``u + s (c - u)`` of diffusers, with ``s = 1 + t``."""
    logits, uncond, tokens, seeds = (t.to(device) for t in _case(2, 9, 50))
    options = {"uncond_logits": uncond, "seed": seeds}
    t = masked_sample(logits, tokens, guidance=2.0, **options)
    s = masked_sample(logits, tokens, guidance_scale=3.0, **options)
    combined = masked_sample(uncond + 3 * (logits - uncond), tokens, seed=seeds)
    assert torch.equal(t.sampled, s.sampled)
    assert torch.equal(t.sampled, combined.sampled)
    torch.testing.assert_close(t.log_probability, combined.log_probability)
    plain = masked_sample(logits, tokens, seed=seeds)
    alike = masked_sample(logits, tokens, uncond_logits=logits, guidance=7.0, seed=seeds)
    assert torch.equal(plain.sampled, alike.sampled)


def test_pictures_do_not_depend_on_their_batch(device: torch.device) -> None:
    logits, _, tokens, seeds = (t.to(device) for t in _case(3, 20, 40))
    together = masked_sample(logits, tokens, seed=seeds, mask_count=4, choice_temperature=1.0)
    for i in range(3):
        alone = masked_sample(logits[i : i + 1], tokens[i : i + 1], seed=seeds[i : i + 1],
                              mask_count=4, choice_temperature=1.0)  # fmt: skip
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_[i])
    numbered = masked_sample(logits, tokens, seed=8)
    explicit = masked_sample(logits, tokens, seed=torch.tensor([8, 9, 10], device=device))
    assert torch.equal(numbered.sampled, explicit.sampled)
    torch.manual_seed(5)
    first = masked_sample(logits, tokens).sampled
    assert not torch.equal(masked_sample(logits, tokens).sampled, first)
    torch.manual_seed(5)
    assert torch.equal(masked_sample(logits, tokens).sampled, first)


PROGRAM = """
import hashlib, torch
from t2p_fast.ops import masked_sample
from t2p_fast import build_info
g = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for v, dtype in ((1000, torch.float32), (8192, torch.bfloat16), (77, torch.float16)):
    c, u = (4 * torch.randn(2, 33, v, generator=g).to(dtype) for _ in range(2))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for options in ({}, {"min_p": 0.05}, {"top_k": 30, "temperature": 0.7}):
            result = masked_sample(c, torch.full((2, 33), v), uncond_logits=u, guidance=1.5,
                                   mask_count=20, choice_temperature=2.0, seed=9, **options)
            if threads == 1:
                one = result if not options else one
                for t in result:
                    digest.update(t.numpy().tobytes())
            elif not options:
                assert all(torch.equal(a, b) for a, b in zip(one, result))
print(build_info()["isa"], digest.hexdigest())
"""


def test_same_bits_on_every_instruction_set(run_python: Callable[..., str]) -> None:
    from t2p_fast import build_info

    levels = build_info()["isa_built"]
    levels = levels[: levels.index(build_info()["isa"]) + 1]
    found = [run_python(PROGRAM, T2P_ISA=isa).split() for isa in levels]
    assert [isa for isa, _ in found] == levels
    assert len({digest for _, digest in found}) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all"])
def test_positions_not_finite(bad: float | str, device: torch.device) -> None:
    logits, _, _, seeds = (t.to(device) for t in _case(1, 6, 70))
    tokens = torch.full((1, 6), 70, device=device)
    clean = masked_sample(logits, tokens, seed=seeds)
    if bad == "all":
        logits[0, 2] = -math.inf
    else:
        logits[0, 2, 66] = bad
    for options in ({}, {"min_p": 0.1}, {"top_k": 3}, {"temperature": 0.0}):
        result = masked_sample(logits, tokens, seed=seeds, mask_count=1, **options)
        assert result.sampled[0, 2] == 0
        assert result.log_probability[0, 2].isnan()
        assert result.tokens[0].tolist().index(70) == 2
    others = torch.arange(6, device=device) != 2
    plain = masked_sample(logits, tokens, seed=seeds)
    assert torch.equal(plain.sampled[0, others], clean.sampled[0, others])


@pytest.mark.not_emulated(reason="four thousand positions")
def test_forbidden_words_are_never_drawn(device: torch.device) -> None:
    logits, uncond, _, _ = (t.to(device) for t in _case(1, 4000, 9))
    logits[..., ::2] = -math.inf
    uncond[..., ::2] = -math.inf
    masked = torch.full((1, 4000), 9, device=device)
    drawn = masked_sample(logits, masked, uncond_logits=uncond, guidance=2.0, seed=0)
    assert (drawn.sampled % 2 == 1).all()
    assert drawn.log_probability.isfinite().all()


@pytest.mark.not_emulated(reason="two thousand positions")
def test_large_logits_and_the_end_of_the_noise(device: torch.device) -> None:
    """A word further behind than the largest noise, 22.9, never wins; ties go to the first."""
    logits = torch.zeros(1, 2000, 3, device=device)
    logits[..., 1] = 30.0
    masked = torch.full((1, 2000), 3, device=device)
    assert (masked_sample(logits, masked, seed=0).sampled == 1).all()
    assert (masked_sample(1e30 * logits, masked, seed=0).log_probability == 0).all()
    assert (masked_sample(logits * 0, masked, seed=0, temperature=0.0).sampled == 0).all()


@pytest.mark.not_emulated(reason="five thousand positions")
def test_min_p_and_top_k_take_words_out(device: torch.device) -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, 1.0], device=device).expand(1, 5000, 5).contiguous()
    masked = torch.full((1, 5000), 5, device=device)

    def words(**options: float) -> list[int]:
        return masked_sample(logits, masked, seed=0, **options).sampled.unique().tolist()

    assert words() == [0, 1, 2, 3, 4]
    assert words(min_p=math.exp(-1.5)) == [0, 1]
    assert words(top_k=1) == [0]
    assert words(top_k=3) == [0, 1, 2, 4]  # what equals the third stays


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_counts_are_those_of_amused_scheduler(schedule: str) -> None:
    """As many positions are masked after every step of diffusers' scheduler.

    Not with 12 steps: it computes in float32, where 64 cos(pi / 3) is less than 32.
    """
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_amused import AmusedScheduler

    n, v, steps = 64, 40, 10
    scheduler = AmusedScheduler(mask_token_id=v, masking_schedule=schedule)
    scheduler.set_timesteps(steps)
    theirs = ours = torch.full((2, n), v)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        logits = torch.randn(2, n, v, generator=generator)
        start, unknown = torch.tensor([n, n]), (ours == v).sum(1)
        count = mask_counts(step, steps, start, unknown, schedule=schedule)
        last = step + 1 == steps
        ours = masked_sample(logits, ours, mask_count=None if last else count, seed=step).tokens
        theirs = scheduler.step(
            logits, scheduler.timesteps[step], theirs, generator=generator
        ).prev_sample
        assert torch.equal((ours == v).sum(1), (theirs == v).sum(1))
    assert not (ours == v).any()


def test_distribution_is_that_of_amused_scheduler() -> None:
    """One round on a small vocabulary, by a two-sample chi-square of all that may come out."""
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_amused import AmusedScheduler

    b, n, v = 4000, 4, 3
    logits = torch.randn(1, n, v, generator=torch.Generator().manual_seed(0)).expand(b, n, v)
    masked = torch.full((b, n), v)
    scheduler = AmusedScheduler(mask_token_id=v)
    scheduler.set_timesteps(4, temperature=(1.5, 1.5))
    theirs = scheduler.step(logits, scheduler.timesteps[1], masked,
                            generator=torch.Generator().manual_seed(1)).prev_sample  # fmt: skip
    ours = masked_sample(logits, masked, mask_count=2, choice_temperature=1.5, seed=0).tokens
    assert torch.equal((ours == v).sum(1), (theirs == v).sum(1))
    weights = (v + 1) ** torch.arange(n)
    counts = torch.stack([(t * weights).sum(1).bincount(minlength=(v + 1) ** n)
                          for t in (ours, theirs)]).double()  # fmt: skip
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(0) / 2
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    degrees = counts.shape[1] - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "v"), [(12, 33), (35, 70), (16, 16), (0, 5)])
def test_layouts(dtype: torch.dtype, n: int, v: int, device: torch.device) -> None:
    """Also ``[b, v, n]``, as an image model has it."""
    logits, uncond, tokens, seeds = (t.to(device) for t in _case(2, n, v))
    logits, uncond = logits.to(dtype), uncond.to(dtype)
    options = {"guidance": 1.0, "seed": seeds, "min_p": 0.01}
    plain = masked_sample(logits, tokens, uncond_logits=uncond, **options)
    image, image_uncond = (t.mT.contiguous().mT for t in (logits, uncond))
    spread = torch.stack([tokens, tokens], -1)[..., 0]
    for c, u in ((image, image_uncond), (image, uncond), (logits[:, :, :], image_uncond)):
        other = masked_sample(c, spread, uncond_logits=u, **options)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    wide = torch.stack([logits, logits], -1)[..., 0]
    other = masked_sample(wide, tokens, uncond_logits=uncond, **options)
    assert torch.equal(other.sampled, plain.sampled)


def test_opcheck(device: torch.device, opcheck: Callable[..., object]) -> None:
    logits, uncond, tokens, seeds = (t.to(device) for t in _case(2, 5, 20))
    count = torch.tensor([1, 0], device=device)
    arguments = (logits, tokens, uncond, count, seeds, None, None, 20, 1.0, 1.0, 1.0, 0.1, 5, 0)
    opcheck(torch.ops.t2p_fast.masked_sample.default, arguments)
    arguments = (logits, tokens, None, None, seeds, None, None, 20, 0.0, 1.0, 1.0, 0.0, 0, 0)
    opcheck(torch.ops.t2p_fast.masked_sample.default, arguments)


@pytest.mark.not_emulated(reason="torch traces it as on a CPU")
def test_compile(device: torch.device) -> None:
    def decode(logits: Tensor, tokens: Tensor, seeds: Tensor) -> MaskedSample:
        count = mask_counts(1, 4, torch.full_like(tokens[:, 0], 9), (tokens == 20).sum(1))
        return masked_sample(2 * logits, tokens, mask_count=count, seed=seeds)

    logits, _, tokens, seeds = (t.to(device) for t in _case(2, 9, 20))
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits, tokens, seeds), decode(logits, tokens, seeds), strict=True):
        assert torch.equal(a, b)


def test_shapes_without_data() -> None:
    logits, tokens = torch.empty(2, 5, 9, device="meta"), torch.empty(2, 5, device="meta").long()
    result = masked_sample(logits, tokens, seed=0, mask_count=2)
    assert [t.shape for t in result] == [(2, 5)] * 3
    assert result.log_probability.dtype == torch.float32


def test_errors(device: torch.device) -> None:
    logits, uncond, tokens, seeds = (t.to(device) for t in _case(2, 5, 9))
    with pytest.raises(TypeError, match="logits must be float32, bfloat16, float16, got float64"):
        masked_sample(logits.double(), tokens)
    with pytest.raises(TypeError, match="mask_count must be an int or an int64 tensor, got a floa"):
        masked_sample(logits, tokens, mask_count=2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logits must be a dense tensor, got a list"):
        masked_sample(logits.tolist(), tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logits must be \[b, n, v >= 1\], got \[5, 9\]"):
        masked_sample(logits[0], tokens)
    with pytest.raises(ValueError, match=r"logits must be \[b, n, v >= 1\], got \[2, 5, 0\]"):
        masked_sample(logits[..., :0], tokens)
    with pytest.raises(TypeError, match="tokens must be int64, got int32"):
        masked_sample(logits, tokens.int())
    with pytest.raises(ValueError, match=r"tokens are \[2, 4\], expected \[2, 5\]"):
        masked_sample(logits, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"uncond_logits are \[2, 4, 9\] but logits are"):
        masked_sample(logits, tokens, uncond_logits=uncond[:, 1:], guidance=1.0)
    with pytest.raises(TypeError, match="uncond_logits are bfloat16 but logits are float32"):
        masked_sample(logits, tokens, uncond_logits=uncond.bfloat16(), guidance=1.0)
    with pytest.raises(ValueError, match="guidance needs uncond_logits"):
        masked_sample(logits, tokens, guidance=1.0)
    with pytest.raises(ValueError, match="give guidance or guidance_scale, not both"):
        masked_sample(logits, tokens, guidance=1.0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="temperature is -1, expected 0 to 1e"):
        masked_sample(logits, tokens, temperature=-1)
    with pytest.raises(ValueError, match="guidance is nan"):
        masked_sample(logits, tokens, uncond_logits=uncond, guidance=math.nan)
    with pytest.raises(ValueError, match="min_p is 2, expected 0 to 1"):
        masked_sample(logits, tokens, min_p=2)
    with pytest.raises(ValueError, match="top_k is -3, expected 0 to inf"):
        masked_sample(logits, tokens, top_k=-3)
    with pytest.raises(TypeError, match="mask_count must be int64, got float32"):
        masked_sample(logits, tokens, mask_count=torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"mask_count is \[3\] on .*, expected \[2\]"):
        masked_sample(logits, tokens, mask_count=seeds[[0, 0, 0]])
    with pytest.raises(TypeError, match="seed must be an int or an int64 tensor, got a float"):
        masked_sample(logits, tokens, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"noise is \[2, 5\] on .*, expected \[2, 5, 9\]"):
        masked_sample(logits, tokens, noise=(logits[..., 0], logits[..., 0]))
    with pytest.raises(ValueError, match="tokens is on meta but logits are on"):
        masked_sample(logits, tokens.to("meta"))
