"""One file per op family: schemas, fakes, gradient, public function. Public names are re-exported by `vqfast`, not here."""
