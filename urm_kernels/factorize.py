from typing import NamedTuple
class F(NamedTuple):
    factors: object
    projection: object
    energy_kept: float
def factorize(W, rank, *, seed=0, whiten=False):
    import torch
    U,S,Vh=torch.linalg.svd(W.double(), full_matrices=False)
    P=Vh[:rank].T
    return F((W.double()@P).float(), P.float(), float((S[:rank]**2).sum()/(S**2).sum()) if (S>0).any() else 1.0)
