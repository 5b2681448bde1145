"""Precision: which arithmetic multiplies matrices, and where weight gradients are accumulated.

The model calls an `Engine` for every matrix product that training spends its time in; the engine decides in which
format the product is taken. Weight gradients never become `.grad`: they are added to `main_grad` buffers.
"""
