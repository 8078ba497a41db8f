from tracking_machine import machine

__all__ = ["machine"]
