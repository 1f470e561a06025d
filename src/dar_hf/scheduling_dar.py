"""Flow matching with a time shift, solved by Adams-Bashforth steps (D-AR, arXiv 2505.23660, section 3; showlab/D-AR).

Time runs from noise to data: ``x_t = t * x_1 + (1 - t) * x_0`` with ``x_0 ~ N(0, I)``, and the model predicts the
velocity ``x_1 - x_0``. Departures from the original code: none by default. ``variable_step=True`` and
``solver_order=1`` are ours.
"""

import bisect
import sys
from numbers import Integral
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

MAX_STEPS = 10_000  # far above any use; the times of a finer grid cannot be told apart by their value


def check_num_steps(num_steps: Any) -> int:
    """``num_inference_steps`` as an int.

    Raises:
        ValueError: for anything but an integer in [1, 10000].
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or not 1 <= int(num_steps) <= MAX_STEPS:
        raise ValueError(f"num_inference_steps must be a positive integer, at most {MAX_STEPS}, got {num_steps!r}.")
    return int(num_steps)


def shift_time(u: torch.Tensor, shift: float) -> torch.Tensor:
    """Map a uniform time ``u`` in [0, 1] to the shifted time ``t = u / (u + shift * (1 - u))``; 0 and 1 stay."""
    return u / (u + shift * (1.0 - u))


class FlowMatchAdamsBashforthSchedulerOutput(NamedTuple):
    """One solver step: a named tuple, to be unpacked or read by name.

    Attributes:
        prev_sample: the sample at the next timestep of the grid, float32.
        pred_original_sample: the jump estimate ``x_t + (1 - t) * v`` of the clean sample, float32.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor

    def to_tuple(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As of diffusers' outputs."""
        return tuple(self)

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As of diffusers' outputs, which are dictionaries too."""
        return self.to_tuple()


class FlowMatchAdamsBashforthScheduler(SchedulerMixin, ConfigMixin):
    """Adams-Bashforth solver of order 2 (or Euler) over a shifted time grid ``t(i / S)``, i = 0 .. S-1, then 1.

    Args:
        shift: time shift beta, > 0; 2.0 in the paper, 1.0 is the uniform grid.
        solver_order: 2 (Adams-Bashforth, the first step is Euler) or 1 (Euler).
        variable_step: False takes the fixed weights 1.5 and -0.5 whatever the step sizes, as the original code does
            and as released weights were evaluated; True takes the weights that are exact for unequal steps.

    Raises:
        ValueError: for a shift that is not positive and finite, an order other than 1 and 2, or a ``variable_step``
            that is not a bool.
    """

    order = 1  # diffusers': calls of the model per step
    init_noise_sigma = 1.0  # the sample starts from noise as it is drawn

    @register_to_config
    def __init__(self, shift: float = 2.0, solver_order: int = 2, variable_step: bool = False):
        if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift <= sys.float_info.max:
            raise ValueError(f"shift must be positive and finite, got {shift!r}.")
        if isinstance(solver_order, bool) or solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 (Euler) or 2 (Adams-Bashforth), got {solver_order!r}.")
        if not isinstance(variable_step, bool):
            raise ValueError(f"variable_step must be True or False, got {variable_step!r}.")
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self._times: list[float] = []
        self._reset()

    def _reset(self) -> None:
        self._previous_velocity: torch.Tensor | None = None
        self._previous_index: int | None = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay the grid of ``num_inference_steps`` shifted times in [0, 1) and forget the solver's history.

        Raises:
            ValueError: for anything but an integer in [1, 10000].
        """
        num_inference_steps = check_num_steps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        times = shift_time(
            torch.arange(num_inference_steps + 1, dtype=torch.float64) / num_inference_steps, self.config.shift
        )
        self._times = times.tolist()  # host copy: stepping never waits for the device
        self.timesteps = times[:-1].to(device=device, dtype=torch.float32)
        self._reset()

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """``sample``: nothing is to be scaled. For code that calls this of every scheduler."""
        return sample

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        if not self._times:
            raise ValueError("call set_timesteps(num_inference_steps) before step or preview.")
        try:
            value = float(+timestep)  # the sign refuses text, which float would read
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"timestep must be a number, got {type(timestep).__name__}.") from error
        above = bisect.bisect_left(self._times, value, hi=len(self._times) - 1)
        neighbours = range(max(above - 1, 0), min(above, len(self._times) - 2) + 1)
        index = min(neighbours, key=lambda i: abs(self._times[i] - value))
        if not abs(self._times[index] - value) <= 1e-5:  # also catches NaN
            raise ValueError(f"timestep {value} is not on the grid of {self.num_inference_steps} steps.")
        return index

    def _direction(self, velocity: torch.Tensor, index: int, step_size: float) -> torch.Tensor:
        """The velocity that one Adams-Bashforth step of ``step_size`` from grid point ``index`` follows."""
        previous = self._previous_velocity
        if previous is None or self.config.solver_order == 1 or self._previous_index != index - 1:
            return velocity
        if self.config.variable_step:
            weight = step_size / (2 * (self._times[index] - self._times[index - 1]))
        else:
            weight = 0.5
        return velocity + weight * (velocity - previous)

    def preview(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The step from ``timestep`` taken straight to t = 1, with the solver's own weights; changes no state.

        Ask before `step`. This is how the original code previews an unfinished sequence; it differs from the jump
        estimate ``pred_original_sample``, which is the paper's formula.
        """
        index = self._index_of(timestep)
        _check_step(model_output, sample)
        step_size = 1.0 - self._times[index]
        return sample.float() + step_size * self._direction(model_output.float(), index, step_size)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> FlowMatchAdamsBashforthSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Advance ``sample`` from ``timestep`` to the next time of the grid.

        Args:
            model_output: the velocity at ``timestep``, shaped like ``sample``.
            timestep: a time of the grid laid by `set_timesteps`.
            sample: the noisy sample, any shape; computed in float32.

        Raises:
            ValueError: before `set_timesteps`, for a time that is not on the grid, or for anything but two tensors
                of one shape.
        """
        index = self._index_of(timestep)
        _check_step(model_output, sample)
        velocity, sample = model_output.float(), sample.float()
        time, next_time = self._times[index], self._times[index + 1]
        step_size = next_time - time
        prev_sample = sample + step_size * self._direction(velocity, index, step_size)
        pred_original_sample = sample + (1.0 - time) * velocity
        self._previous_velocity, self._previous_index = velocity, index
        if not return_dict:
            return (prev_sample, pred_original_sample)
        return FlowMatchAdamsBashforthSchedulerOutput(prev_sample, pred_original_sample)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """``t * original_samples + (1 - t) * noise`` for shifted times ``t`` in [0, 1], a scalar or one per sample."""
        times = torch.as_tensor(timesteps, device=original_samples.device, dtype=original_samples.dtype)
        times = times.reshape(-1, *[1] * (original_samples.ndim - 1))
        return times * original_samples + (1.0 - times) * noise

    def __len__(self) -> int:
        return self.num_inference_steps or 0


def _check_step(model_output: Any, sample: Any) -> None:
    for name, value in (("model_output", model_output), ("sample", sample)):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if model_output.shape != sample.shape:
        raise ValueError(
            f"model_output must have the shape {tuple(sample.shape)} of sample, got {tuple(model_output.shape)}."
        )


# options of diffusers' scheduler that lay another grid or draw noise; at these defaults it is Euler over ours
_OTHER_GRIDS = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


def to_adams_bashforth(scheduler: Any) -> FlowMatchAdamsBashforthScheduler:
    """The scheduler itself, or for diffusers' `FlowMatchEulerDiscreteScheduler` ours of order 1 with its shift.

    Diffusers' counts from data to noise, ``sigma = 1 - t``, and its velocity points to the noise; over the grid
    ``sigma = 1, 1 - 1/S, ..., 1/S, 0``, which its pipelines lay, its steps are those of our Euler solver.

    Raises:
        ValueError: for any other scheduler, naming its class, and for options that ours does not have.
    """
    # by names: a self-contained repository has our class in two files, and diffusers' need not be imported for this
    name, module = type(scheduler).__name__, type(scheduler).__module__
    if FlowMatchAdamsBashforthScheduler.__name__ in (base.__name__ for base in type(scheduler).__mro__):
        return scheduler
    if name != "FlowMatchEulerDiscreteScheduler" or not module.startswith("diffusers."):
        raise ValueError(
            f"as scheduler a {name} cannot solve this model's flow: take a FlowMatchAdamsBashforthScheduler, or "
            "diffusers' FlowMatchEulerDiscreteScheduler."
        )
    others = [f"{option}={scheduler.config[option]!r}" for option in _OTHER_GRIDS if scheduler.config.get(option)]
    if others:
        raise ValueError(
            f"a FlowMatchEulerDiscreteScheduler with {', '.join(others)} cannot be taken for a "
            "FlowMatchAdamsBashforthScheduler: only its shift can."
        )
    return FlowMatchAdamsBashforthScheduler(shift=scheduler.shift, solver_order=1)
