"""The process of :func:`fastvideo.tests.fake_cuda.take_steps`; the guard comes before torch."""

import ctypes
import json
import os
import sys

ctypes.CDLL(os.environ["FAKE_CUDA_GUARD"])

from fastvideo.tests.fake_cuda.device import pretend  # noqa: E402

pretend()

from fastvideo.tests.fake_cuda.steps import measured  # noqa: E402

print(json.dumps(measured(**json.loads(sys.argv[1]))))
