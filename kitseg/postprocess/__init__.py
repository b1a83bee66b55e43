"""Masks of kidneys and tumors are cleaned by priors, what medicine knows of them; a file each.

``kidneys``    at most two kidneys, neither of them a speck
``holes``      kidneys and tumors have no holes
``shape``      tumors are neither rods nor balls
``overlap``    tumors lie in kidneys
``intensity``  tumors are not as dark as fluid
``distance``   nothing lies far from the kidneys

``prior`` says what they have in common, ``components`` finds connected components for all of them.
"""
