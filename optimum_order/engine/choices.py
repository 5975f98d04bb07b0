"""What text arguments of the public verbs may say, as types that an editor completes."""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""The dtype of a model; "auto" keeps the checkpoint's."""
CalibrationDType = Literal["auto", "float32", "bfloat16"]
"""What calibration multiplies matrices in."""
Embeddings = Literal["keep", "4", "6", "8", "coded"]
"""What becomes of the embedding where no stage names it."""
Pause = Literal["auto", "block", "group"]
"""Where a run pauses to compress layers."""
Schedule = Literal["stage", "block"]
"""Whether the whole model is walked once for each stage, or each block gets all stages."""
Strategy = Literal["auto", "measure", "pih", "proxy"]
"""How a plan ranks orders."""
