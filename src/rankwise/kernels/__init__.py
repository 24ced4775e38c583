"""Fast paths around the adapted layers, each beside the plain form that it must equal; nothing in here knows a method.

`site` holds the products of a site. `remade` lets a site remake its input in the backward instead of keeping it; `norm` and `gated` make
such inputs. `head_loss` is the cross-entropy over a frozen output head, `dropout` draws only the elements that fall out and keeps no mask,
`gain` multiplies rows by a gain in one pass.
"""
