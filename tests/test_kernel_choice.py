"""Which kernel runs on which device, and the reason where fla's cannot."""

import pytest
import torch

from hf_hybrid.modeling import kernels


class TestChoice:
    def test_cpu_tensors_never_go_to_fla(self):
        assert not kernels.use_fla(torch.device("cpu"), "auto")
        assert not kernels.use_fla(torch.device("cuda"), "torch")

    def test_forced_fla_says_why_not(self):
        with pytest.raises(RuntimeError, match="tensors are on 'cpu'"):
            kernels.use_fla(torch.device("cpu"), "fla")

    def test_reason(self, monkeypatch):
        kernels.why_not_fla.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert kernels.why_not_fla() == "torch sees no CUDA device"
        with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
            kernels.use_fla(torch.device("cuda"), "fla")
        assert not kernels.use_fla(torch.device("cuda"), "auto")

    @pytest.mark.parametrize(
        ("version", "broken"), [("3.3.1", False), ("3.5.0", True), ("3.7.0", True), ("3.7.1", False)]
    )
    def test_triton_versions_with_wrong_gradients_on_hopper(self, monkeypatch, version, broken):
        kernels.why_not_fla.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: version)
        monkeypatch.setattr(kernels.importlib, "import_module", lambda name: None)
        reason = kernels.why_not_fla()
        kernels.why_not_fla.cache_clear()
        assert (reason is not None and "wrong gradients on Hopper" in reason) == broken
