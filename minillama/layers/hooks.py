"""Modules that were changed by hand, hooks and kernels, which faster paths around them have to heed."""

from __future__ import annotations

from torch import nn


def is_own(kernel: object) -> bool:
    """Whether a kernel is this package's, and not set by hand."""
    return (getattr(kernel, "__module__", "") or "").startswith("minillama.")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its `forward`."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


def is_changed(head: nn.Module) -> bool:
    """Whether a linear layer, whose matrix may be used without calling it, does more than its product."""
    return has_hooks(head) or not hasattr(head, "weight") or getattr(head, "bias", None) is not None


def changed(model: nn.Module) -> str | None:
    """First module with hooks or a kernel set by hand, or None."""
    for name, part in model.named_modules():
        if has_hooks(part):
            return f"{name or 'the model'} has hooks"
        if not is_own(getattr(part, "kernel", is_own)):
            return f"the kernel of {name} is not this package's"
    return None
