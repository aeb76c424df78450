# SPDX-License-Identifier: Apache-2.0
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from t2p_fast import memory, ops

FLOATS = memory.LARGE // 4


@pytest.fixture(autouse=True)
def _nothing_cached() -> Iterator[None]:
    limit = memory.limit()
    memory.empty_cache()
    yield
    memory.set_limit(limit)
    memory.empty_cache()


def test_memory_of_a_result_is_given_to_the_next() -> None:
    like = torch.empty(1)
    first = memory.empty([FLOATS], like)
    address, part = first.data_ptr(), first[5:7]
    del first
    assert memory.cached_bytes() == 0  # a view has it still
    other = memory.empty([FLOATS], like)
    assert other.data_ptr() != address
    del part
    assert memory.cached_bytes() >= memory.LARGE
    assert memory.empty([2, FLOATS], like, torch.bfloat16).data_ptr() == address


def test_small_results_are_torchs() -> None:
    del_me = memory.empty([FLOATS - 1], torch.empty(1))
    del del_me
    assert memory.cached_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_shape_strides_and_dtype_are_those_of_empty_like(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 512, 513, dtype=dtype)
    frames = torch.zeros(2, 8, 4, 128, 128, dtype=dtype)
    for like in (
        x,
        x.to(memory_format=torch.channels_last),
        x.permute(1, 3, 0, 2),
        x[:, :1],
        x[..., ::2],
        x[:, :1].expand(2, 6, 512, 513),
        frames.to(memory_format=torch.channels_last_3d),
        x[:0],
    ):
        y, wanted = memory.empty_like(like), torch.empty_like(like)
        assert (y.shape, y.stride(), y.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        y.fill_(3)
        assert (y == 3).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.complex64])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    assert memory.empty_like(torch.zeros(1 << 21, dtype=dtype)).dtype == dtype
    assert memory.cached_bytes() == 0


def test_the_limit_holds_and_those_longest_free_go_first() -> None:
    like, size = torch.empty(1), 2 * memory.LARGE
    memory.set_limit(2 * size)
    kept = [memory.empty([size // 4], like) for _ in range(3)]
    addresses = [x.data_ptr() for x in kept]
    while kept:
        del kept[0]
    assert memory.cached_bytes() == 2 * size
    again = [memory.empty([size // 4], like) for _ in range(2)]
    assert [x.data_ptr() for x in again] == addresses[:0:-1]
    memory.set_limit(0)
    del again
    assert memory.cached_bytes() == 0
    with pytest.raises(ValueError, match=r"set_limit: size is -1, expected at least 0"):
        memory.set_limit(-1)


def test_threads_share_it_without_sharing_memory() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            x = memory.empty([FLOATS], torch.empty(1))
            x[::1024] = number
            if not bool((x[::1024] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_takes_and_gives() -> None:
    x = memory.empty([FLOATS], torch.empty(1)).fill_(1)
    child = os.fork()
    if child == 0:  # without torch's threads, of which it has none
        x[:8].fill_(2)
        del x
        y = memory.empty([FLOATS], torch.empty(1))
        y[:8].fill_(3)
        os._exit(0 if bool((y[:8] == 3).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((x == 1).all())


def test_results_of_ops_are_cached_and_behave_like_others() -> None:
    x = torch.randn(1, 64, 64, 128, requires_grad=True)
    y = ops.group_norm_silu(x, 8)
    y.square().sum().backward()
    assert x.grad is not None
    before = y.detach().clone()
    assert torch.equal(_shared(y.detach()), before)
    del y
    with torch.no_grad():
        compiled = torch.compile(lambda x: ops.group_norm_silu(x, 8) + 1, fullgraph=True)
        torch.testing.assert_close(compiled(x), before + 1)
    memory.empty_cache()
    ops.group_norm_silu(x.detach(), 8)
    assert memory.cached_bytes() >= x.nbytes


def _shared(x: Tensor) -> Tensor:
    assert x.share_memory_().is_shared()
    return x
