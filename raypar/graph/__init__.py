"""The model as data: capture, clean-up passes, batch states, costs."""
