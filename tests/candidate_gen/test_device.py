"""What --device may say; a device that is not there is refused in words that help."""

from __future__ import annotations

import pytest
import torch

from candidate_gen.index.device import found, is_cpu, resolve

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def test_the_cpu_is_always_there_and_auto_takes_a_gpu_only_where_one_is() -> None:
    assert resolve("cpu") == "cpu"
    assert resolve("auto") == ("cuda:0" if GPUS else "cpu")
    assert is_cpu(resolve("cpu"))
    assert not is_cpu("cuda:1")


def test_a_gpu_that_is_not_there_is_named_with_what_was_found() -> None:
    with pytest.raises(ValueError, match=rf"--device cuda:{GPUS}: torch {torch.__version__[:4]}.*--device cpu") as told:
        resolve(f"cuda:{GPUS}")
    assert found() in str(told.value)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "auto:1", "CUDA"])
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="give auto, cpu, cuda or cuda:N"):
        resolve(name)
