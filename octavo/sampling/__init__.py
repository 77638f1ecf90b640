"""From logits to tokens: what each row asks for, kept on the device and updated there.

Owns the rows' sampling parameters, the logits transforms (penalties, bias, allowed ids, minimum length, bad words) and
log-probabilities. Does not own the arithmetic of a draw (octavo.kernels) or stopping (scheduler, frontend). Start
reading at sampler.py.
"""

from octavo.sampling.sampler import Sampler, Samples, prompt_logprobs
from octavo.sampling.transforms import LogitsTransform

__all__ = ["LogitsTransform", "Sampler", "Samples", "prompt_logprobs"]
