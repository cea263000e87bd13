"""What a run says about itself: named metrics, where they are written, what they mean, how they look.

Nothing here imports torch. matplotlib, rich and TensorBoard are imported by the module that needs them.
"""
