"""The meta-gradient of learning to reweight, exact and without an unrolled graph.

Take one virtual optimizer step from theta on sum_i e_i l_i(theta). At e = 0 the clean loss L after it has the gradient

    dL / de_i = -<A grad L(theta'), grad l_i(theta)>

theta' is where the step leads at e = 0 (weight decay and momentum move it), and the diagonal A is minus the derivative
of the step by the gradient that it gets. So -dL / de_i is the derivative of l_i in the direction A grad L(theta'). One
forward-mode product gives it for all i, in the same pass that builds the graph of the training loss:

    direction = clean_direction(network, optimizer, clean_images, clean_labels)
    logits, tangents = forward_with_tangents(network, images, direction)
    agreement = agreement_of(losses, logits, tangents)  # (N,); above 0: trains in a direction that lowers L
    loss = (weights_from(agreement) * losses(logits)).sum()

Source: Ren et al., ICML 2018, arXiv 1803.09050. Differs: they unroll the step and differentiate twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from medmask.errors import ConfigError

Losses = Callable[[Tensor], Tensor]  # logits (N, K) to the losses of the examples (N,)


def clean_direction(
    network: nn.Module, optimizer: optim.Optimizer, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """A grad L(theta') of the mean cross-entropy on a clean batch, by parameter name.

    Parameters
    ----------
    network : not wrapped; batch norm takes its mode from it. Buffers and `.grad` stay as they are.
    optimizer : SGD, Adam or AdamW before its real step; what it does not train, or is frozen, does not move
    images, labels : (M, C, H, W) and (M,) int64. Ranks that share batch statistics all give the same batch, and then
        hold the gradient of one process.

    Raises
    ------
    ConfigError : an optimizer whose step has no known derivative; one image where batch norm has no other value.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    steps = virtual_steps(optimizer, list(trained.values()))
    moving = {name: steps[p] for name, p in trained.items() if p in steps}
    moved = {name: target.requires_grad_() for name, (target, _) in moving.items()}
    with torch.enable_grad():
        logits = clean_pass(network, moved, images)
        loss = functional.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
    return {
        name: scale * gradient
        for (name, (_, scale)), gradient in zip(moving.items(), gradients, strict=True)
        if gradient is not None
    }


def forward_with_tangents(network: nn.Module, images: Tensor, direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The ordinary forward pass, and beside it the derivative of the logits in a direction of the parameters.

    Returns
    -------
    logits (N, K) with their graph, as `network(images)` gives them: running statistics are updated, once; tangents
    (N, K), detached.

    Raises
    ------
    ConfigError : a layer has no forward-mode rule, as torch's SyncBatchNorm over several ranks.
    """
    duals: dict[str, Tensor] = {
        name: Dual(p, direction[name]) for name, p in network.named_parameters() if name in direction
    }
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode rule
            logits = functional_call(network, duals, images)
    except NotImplementedError as error:
        raise ConfigError(
            f"backbone: the meta-gradient cannot follow a layer of it, take another one; {error}"
        ) from error
    if not isinstance(logits, Dual):
        return logits, torch.zeros_like(logits)
    return logits.primal, logits.tangent


def forward_with_last_layer_tangents(
    network: nn.Module, optimizer: optim.Optimizer, images: Tensor, clean_images: Tensor, clean_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """What `clean_direction` and `forward_with_tangents` give were all but the last linear layer frozen: far cheaper.

    Raises
    ------
    ConfigError : the last layer is not linear or not trained; or as for `clean_direction`.
    """
    layer = [module for module in network.modules() if not any(True for _ in module.children())][-1]
    steps = virtual_steps(optimizer, [p for p in layer.parameters() if p.requires_grad])
    if not isinstance(layer, nn.Linear) or layer.weight not in steps:
        raise ConfigError("method: the last layer of this network is no linear layer that is trained")
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    try:
        with torch.no_grad():
            clean_pass(network, {}, clean_images)
        logits = network(images)
    finally:
        hook.remove()
    clean_features, features = inputs
    moved = {name: steps[p] for name, p in layer.named_parameters() if p in steps}
    targets = [target.requires_grad_() for target, _ in moved.values()]
    with torch.enable_grad():
        clean_logits = functional_call(layer, dict(zip(moved, targets, strict=True)), clean_features)
        gradients = torch.autograd.grad(functional.cross_entropy(clean_logits, clean_labels), targets)
    direction = {name: scale * gradient for (name, (_, scale)), gradient in zip(moved.items(), gradients, strict=True)}
    return logits, functional.linear(features, direction["weight"], direction.get("bias")).detach()


def agreement_of(losses: Losses, logits: Tensor, tangents: Tensor) -> Tensor:
    """Minus the meta-gradient of each example, (N,), detached; float32 unless the logits are float64.

    `losses` gives each example's loss from its own row of the logits, against labels of any kind.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.func.jvp(losses, (logits.detach().to(dtype),), (tangents.to(dtype),))[1].detach()


Step = tuple[Tensor, Tensor | float]


def virtual_steps(optimizer: optim.Optimizer, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Step]:
    """Where an optimizer would move each parameter at a gradient of 0, and minus the derivative of that (diagonal)."""
    wanted, steps = set(parameters), {}
    for group in optimizer.param_groups:
        if type(optimizer) not in STEPS or group.get("maximize") or group.get("amsgrad"):
            raise ConfigError(
                "optimizer: the meta-gradient needs the derivative of a step, known for SGD, Adam and AdamW without "
                f"maximize and amsgrad; got {type(optimizer).__name__}"
            )
        for parameter in group["params"]:
            if parameter in wanted:
                step = STEPS[type(optimizer)]
                steps[parameter] = step(parameter.detach(), optimizer.state.get(parameter, {}), group)
    return steps


def sgd_step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Step:
    """The update is a times (gradient + decay) plus b times the buffer."""
    lr, momentum, buffer = group["lr"], group["momentum"], state.get("momentum_buffer")
    a, b = (1 - group["dampening"], momentum) if momentum and buffer is not None else (1.0, 0.0)
    if group["nesterov"]:
        a, b = 1 + momentum * a, momentum * b
    moved = parameter * (1 - lr * a * group["weight_decay"])
    return (moved.sub_(buffer, alpha=lr * b) if b else moved), lr * a


def adam_step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Step:
    """Without state or gradient the slope is 1 / eps: exact, but of use to gradients far below eps only."""
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    is_decoupled = group.get("decoupled_weight_decay", False)
    gradient = torch.zeros_like(parameter) if is_decoupled else parameter * decay
    age = float(state.get("step", 0)) + 1
    correction1, correction2 = 1 - beta1**age, 1 - beta2**age
    mean = (beta1 * state.get("exp_avg", 0) + (1 - beta1) * gradient) / correction1
    root = ((beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * gradient**2) / correction2).sqrt()
    scale = root + group["eps"]
    root_slope = torch.where(root > 0, (1 - beta2) * gradient / (correction2 * root), 0)
    slope = (1 - beta1) / correction1 / scale - mean / scale**2 * root_slope
    start = parameter * (1 - lr * decay) if is_decoupled else parameter
    return start - lr * mean / scale, lr * slope


STEPS = {optim.SGD: sgd_step, optim.Adam: adam_step, optim.AdamW: adam_step}


def clean_pass(network: nn.Module, moved: dict[str, Tensor], images: Tensor) -> Tensor:
    """Logits (M, K) of the trusted images with some parameters moved; running statistics stay as they are."""
    try:
        return functional_call(network, {**moved, **copied_buffers(network)}, images)
    except ValueError as error:
        if len(images) > 1:
            raise
        raise ConfigError(f"meta.size: batch norm has no statistics of one trusted image, take two; {error}") from error


def copied_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Running statistics for a pass that must not touch the real ones."""
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


class Dual(Tensor):
    """A tensor in the graph and its tangent outside it; what torch computes from it is one again.

    Forward mode over a whole network would put the tangents in the graph and keep them all. Here each call has a level
    of its own, and its tangent leaves the graph at once.
    """

    primal: Tensor
    tangent: Tensor

    @staticmethod
    def __new__(cls, primal: Tensor, tangent: Tensor) -> "Dual":
        dual = Tensor._make_wrapper_subclass(cls, primal.shape, dtype=primal.dtype, device=primal.device)
        dual.primal, dual.tangent = primal, tangent
        return dual

    def __init__(self, primal: Tensor, tangent: Tensor) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():
            raise NotImplementedError("no_grad or an autograd.Function would lose the tangent")
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            return batch_norm(*args, **kwargs)
        name = func.__name__
        is_in_place = kwargs.get("inplace", False) or (name.endswith("_") and not name.endswith("__"))
        if name == "__setitem__" or (is_in_place and not isinstance(args[0], Dual)):
            raise NotImplementedError(f"{name} in place into a tensor without tangent")
        if is_in_place and not args[0].primal._is_view():  # the same out of place, which is cheaper here
            func = func if "inplace" in kwargs else getattr(Tensor, name[:-1], func)
            kwargs = {option: value for option, value in kwargs.items() if option != "inplace"}
        with forward_ad.dual_level():
            entered = tree_map(enter, (args, kwargs))
            result = tree_map(leave, func(*entered[0], **entered[1]))
        if not is_in_place:
            return result
        dtype = args[0].primal.dtype
        args[0].primal, args[0].tangent = result.primal.to(dtype), result.tangent.to(dtype)
        return args[0]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} was called past the functions of torch")


def enter(value: Any) -> Any:
    return forward_ad.make_dual(value.primal, value.tangent) if isinstance(value, Dual) else value


def leave(value: Any) -> Any:
    tangent = forward_ad.unpack_dual(value).tangent if isinstance(value, Tensor) else None
    return value if tangent is None else Dual(value, tangent.detach())


def primal_of(value: Any) -> Any:
    return value.primal if isinstance(value, Dual) else value


def batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Dual:  # fmt: skip
    """`functional.batch_norm`, cheaper than by torch's rule.

    Its derivative by the input is a symmetric matrix, so that the kernel of the backward pass serves forward mode too.
    """
    values, scale, shift = primal_of(input), primal_of(weight), primal_of(bias)
    output = functional.batch_norm(values, running_mean, running_var, scale, shift, training, momentum, eps)
    with torch.no_grad():
        mean, inverse = running_mean, None
        if training:
            _, mean, inverse = torch.native_batch_norm(values, scale, shift, None, None, True, 0.0, eps)
        else:
            inverse = torch.rsqrt(running_var + eps)
        spread = [1, -1] + [1] * (values.dim() - 2)
        slope = inverse * weight.tangent if isinstance(weight, Dual) else torch.zeros_like(mean)
        start = bias.tangent - mean * slope if isinstance(bias, Dual) else -mean * slope
        tangent = torch.addcmul(start.view(spread), values, slope.view(spread))
        if isinstance(input, Dual):
            own = (None, None, mean, inverse) if training else (running_mean, running_var, None, None)
            tangent += torch.ops.aten.native_batch_norm_backward(
                input.tangent, values, scale, *own, training, eps, [True, False, False]
            )[0]
    return Dual(output, tangent.to(output.dtype))
