"""Post-processing of kidney and tumor masks by anatomical priors, one file each.

``kidneys``    at most two kidneys of sufficient size
``holes``      kidneys and tumors have no holes
``shape``      tumors are neither elongated nor perfectly round
``overlap``    tumors lie in kidneys
``intensity``  tumors are not as dark as fluid
``distance``   nothing lies far from the kidneys

``prior`` defines their interface; ``kitseg.components`` finds the connected components.
"""
