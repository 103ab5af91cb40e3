"""The process of :func:`fastvideo.tests.fake_cuda.take_steps`; the guard comes before torch."""

import ctypes
import json
import os
import sys

ctypes.CDLL(os.environ["FAKE_CUDA_GUARD"])

from fastvideo.tests.fake_cuda.device import pretend  # noqa: E402

pretend()

from fastvideo.tests.fake_cuda import steps  # noqa: E402

what = {"steps": steps.measured, "validation": steps.validated}[sys.argv[1]]
print(json.dumps(what(**json.loads(sys.argv[2]))))
