"""Language models of bytes, dense against sparse: what do blocks cost, and what do they buy?"""
