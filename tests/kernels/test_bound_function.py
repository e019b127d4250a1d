"""Functions of integers that the extension binds to an object (csrc/common/bound_function.hpp)."""

import pytest
import torch

from mkf.kernels import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason="needs the compiled extension")


class TestBoundFunction:
    def setup_method(self):
        self.tensors = torch.ones(8, 7, 7), torch.zeros(4, dtype=torch.int32), torch.ones(4), torch.ones(4)
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.holds = extension.native().snapshot(*self.addresses, self.tensors[0].nbytes, self.tensors[1].nbytes, 4)

    def test_it_keeps_its_object(self):
        assert self.holds(*self.addresses) is True
        self.tensors[1][2] = 5
        assert self.holds(*self.addresses) is False

    def test_arguments_that_are_refused(self):
        for numbers, error in (
            (self.addresses[:3], TypeError),
            ([*self.addresses, 0], TypeError),
            ([*self.addresses[:3], "one"], TypeError),
            ([*self.addresses[:3], None], TypeError),
            ([*self.addresses[:3], -1], OverflowError),
            ([*self.addresses[:3], 1 << 64], OverflowError),
        ):
            with pytest.raises(error):
                self.holds(*numbers)
        with pytest.raises(TypeError):
            self.holds(keys=1)
