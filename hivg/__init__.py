"""HiVG: visual grounding with CLIP, a cross-modal bridge and hierarchical LoRA."""

__all__ = ["Grounder"]


def __getattr__(name):
    """Import the Grounder when it is first asked for, so that `import hivg.boxes` stays light."""
    if name == "Grounder":
        from hivg.grounder import Grounder

        return Grounder
    raise AttributeError(f"module 'hivg' has no attribute {name!r}")
