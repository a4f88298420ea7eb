"""The faults that `benchmarks.planted_faults` plants: for each file their kind, the text, and what replaces it.

A text stands once in its file, and is as short as that allows, so that a change nearby does not lose it. Most of them
are faults that nothing would announce: wrong numbers, ignored masks, lost settings, hooks and caches that stay.
"""

Planted = tuple[str, str, str]

# fmt: off
FAULTS: dict[str, list[Planted]] = {
    "statistics/spectrum.py": [
        ("wrong sign", "drift = other.mean - self.mean", "drift = self.mean - other.mean"),
        ("off by one", "degrees = max(moments.n_samples - 1, 1)", "degrees = max(moments.n_samples, 1)"),
        ("dropped term", "self.scatter + other.scatter + float(row @ row)", "self.scatter + other.scatter"),
        ("wrong power", "(self.n_samples * other.n_samples / n) ** 0.5", "(self.n_samples * other.n_samples / n)"),
        ("wrong sign", "rows * largest.sign()", "rows * -largest.sign()"),
        ("off by a few", "/ max(width - kept, 1)", "/ max(width, 1)"),
        ("wrong power", "(vectors / weights.sqrt()).T @ rows", "(vectors / weights).T @ rows"),
        ("dropped term", "scatter + torch.outer(drift, drift)", "scatter"),
        ("wrong order", "angles[::-1].copy()", "angles.copy()"),
    ],
    "statistics/second_moment.py": [
        ("dropped term", "(self.excess + self.floor) ** power - self.floor**power", "self.excess**power"),
        ("dropped term", "(spectrum.total_variance + float(mean @ mean))", "spectrum.total_variance"),
    ],
    "statistics/incremental_svd.py": [
        ("dropped term", "offsets = rows - mean\n    scatter", "offsets = rows\n    scatter"),
        ("ignored weights", "rows if weights is None else rows * weights[:, None]", "rows"),
        ("dropped term", "self.gram + other.gram + torch.outer(along, along).cpu()", "self.gram + other.gram"),
        ("dropped term", "self.image + other.image + torch.outer(along, drift)", "self.image + other.image"),
        ("missing check", "if jumps or len(rows) <=", "if len(rows) <="),
        ("lost dtype", "rows = rows.to(torch.promote_types(rows.dtype, torch.float32))",
         "rows = rows.bfloat16().float()"),
        ("dropped term", "gram.diagonal() + len(rows) * (directions @ gap", "gram.diagonal() + 0 * (directions @ gap"),
        ("dropped term", "overlap @ self.weights + (1.0 - overlap.sum(1)) * max(rest, 0.0)", "overlap @ self.weights"),
        ("missing check", "not _SMALLEST < squares < _LARGEST", "False"),
        ("missing check", "if not math.isfinite(squares):", "if False:"),
        ("off by one", "if len(rows) == 0:", "if len(rows) <= 1:"),
        ("stale state", "self._state = self._state.plus(self._gathered)\n            self._gathered = None",
         "self._state = self._state.plus(self._gathered)"),
        ("missing check", "check_alike(self.center, other.center)", "pass"),
    ],
    "statistics/gradient_spectrum.py": [
        ("dropped factor", "(self.singular_values[:, None] * self.right.double())", "self.right.double()"),
        ("wrong sum", "state.squares + g.square().sum(0)", "state.squares + g.square().mean(0)"),
        ("dropped term", "left = state.left + _left_image(g, x, inputs)", "left = _left_image(g, x, inputs)"),
        ("dropped factor", "mean.squares / max(mean.n_samples, 1)", "mean.squares"),
        ("wrong count", "values / max(n_labels, 1)", "values / max(mean.n_samples, 1)"),
        ("dropped term", "one.squares + two.squares", "one.squares"),
        ("swapped arguments", "(a, b, a, b), (c, d, c, d)", "(a, b, a, b), (a, b, a, b)"),
        ("missing check", "if new is not None and not bool(", "if False and not bool("),
    ],
    "statistics/merging.py": [
        ("dropped factor", "gap = count**0.5 * (own_mean - mean)", "gap = own_mean - mean"),
        ("dropped term", "one.total_variance * degrees + float(gap @ gap)", "one.total_variance * degrees"),
        ("dropped factor", "noise += one.noise_variance * degrees", "noise += one.noise_variance"),
        ("dropped term", "directions, weights + noise)", "directions, weights)"),
        ("wrong power", "share * size.output**2", "share * size.output"),
        ("ignored weights", "share * one.singular_values[:, None]",
         "one.singular_values[:, None]"),
        ("dropped factor", "[share * one.output_moment for", "[one.output_moment for"),
        ("missing check", '_ALIKE = ("center", "token_mask", "task_type")', '_ALIKE = ("token_mask", "task_type")'),
        ("missing check", " and off <= _SUM_TOLERANCE", ""),
    ],
    "statistics/statistics.py": [
        ("dropped factor", "least = 2 * len(self.explained_variance(name))",
         "least = len(self.explained_variance(name))"),
        ("missing check", "or not bool(tensor.isfinite().all())", ""),
        ("missing check", "and bool((along >= 0.0).all())", ""),
    ],
    "statistics/tensorfile.py": [
        ("missing check", 'if _digest(tensor) != self._digests.get(name):', "if False:"),
    ],
    "layers/masks.py": [
        ("ignored mask", "return flat if tokens is None else flat.index_select(0, tokens)", "return flat"),
        ("wrong sign", "return labels != IGNORED if", "return labels == IGNORED if"),
        ("off by one", "labelled = nn.functional.pad(labelled[:, 1:], (0, 1))", "labelled = labelled.clone()"),
        ("ignored mask", "labelled.flip(1).cumsum(1).flip(1) > 0", "labelled"),
        ("ignored mask", "_numbered(main | labelled)", "_numbered(main)"),
        ("missing check", "_check_padding(labelled, own)", "pass"),
        ("ignored mask", " or name in self._cross_inputs", ""),
        ("ignored mask", " or not self._is_text(name)", ""),
        ("wrong sign", "labelled & own", "labelled | own"),
        ("swapped axes", "mask = mask.flatten(0, 1)", "mask = mask.transpose(0, 1).flatten(0, 1)"),
    ],
    "layers/rows.py": [
        ("swapped axes", "((size - 1) // 2, size // 2)", "(size // 2, (size - 1) // 2)"),
        ("lost setting", "x.unfold(2 + i, size, step)", "x.unfold(2 + i, size, 1)"),
        ("ignored mask", "(chosen == expert).any(-1)", "(chosen == expert)[..., 0]"),
        ("dropped term", "up if bias is None else up + bias[expert]", "up"),
        ("missing check", "if spread and module.padding", "if False and module.padding"),
        ("wrong order", "for pair in reversed(self.padding)", "for pair in self.padding"),
    ],
    "layers/targets.py": [
        ("dropped factor", "self.out_features // self.groups)", "self.out_features)"),
        ("dropped factor", "max(self.experts, 1) * (self.in_features", "(self.in_features"),
        ("loose match", 'name.endswith(f".{pattern}")', "name.endswith(pattern)"),
    ],
    "layers/identity.py": [
        ("stale key", 'digest.update(f"{name}:{tuple(weight.shape)};".encode())',
         'digest.update(f"{tuple(weight.shape)};".encode())'),
        ("stale key", "digest.update(values.view(torch.int16).numpy().tobytes())", "pass"),
    ],
    "layers/grid.py": [
        ("wrong order", "key=len, reverse=True)", "key=len)"),
    ],
    "layers/running.py": [
        ("lost setting", 'inputs.setdefault("use_cache", False)', 'inputs.setdefault("use_cache", True)'),
    ],
    "collection/activations.py": [
        ("stale cache", " or seen_version != version", ""),
        ("counted twice", "if not goes_backward():  # or one", "if True:  # or one"),
        ("dropped term", "y if bias is None else y - bias", "y"),
        ("forgotten hook", "self._stack.callback(handle.remove)", "pass"),
        ("forgotten state", "self._stack.enter_context(evaluating(self.model))", "self.model.eval()"),
        ("forgotten state", "self._batch, self._sink, self._read = None, None, {}",
         "self._batch, self._read = None, {}"),
        ("missing check", "to_the_end |= any(head is module", "to_the_end |= all(head is module"),
        ("stale cache", 'class_name(module) == "Linear8bitLt" else None', 'class_name(module) == "" else None'),
    ],
    "collection/backward.py": [
        ("dropped factor", "self._loss_of(moved) * n_labels", "self._loss_of(moved)"),
        ("forgotten state", "stack.callback(parameter.requires_grad_, True)", "pass"),
        ("ignored mask", "predicting=True", "predicting=False"),
        ("missing check", "if version_of(call.x) != call.version:", "if False:"),
        ("forgotten state", "            del layer.forward", "            pass"),
        ("missing check", "if not math.isfinite(value):", "if False:"),
        ("forgotten hook", "self._stack.close()", "pass"),
    ],
    "collection/collect.py": [
        ("wrong power", 'math.sqrt(collected.sums["outputs", name] / tokens)',
         'collected.sums["outputs", name] / tokens'),
        ("dropped factor", 'collected.sums["inputs", group] / groups[group].n_samples',
         'collected.sums["inputs", group]'),
        ("wrong count", "n_batches = sum(collected.n_batches) - len(collected.bad)",
         "n_batches = sum(collected.n_batches)"),
        ("stale count", "max_batches - sum(done.used)", "max_batches"),
        ("lost setting", "n_triplets=max(job.n_components, 2 * made.rank)", "n_triplets=made.rank"),
    ],
    "collection/loop.py": [
        ("stale state", "self.halves = (other, half)", "self.halves = (half, other)"),
        ("dropped factor", "self.keeps = 2 * agreement / (1 + agreement)", "self.keeps = agreement"),
        ("wrong sign", "keeps < 1.0 - tolerance", "keeps < tolerance"),
        ("missing check", " and rise <= 2 * tolerance", ""),
        ("dropped term", "self.found.n_labels + self._n_labels, 0", "self._n_labels, 0"),
        ("stale state", "            halves.current.forget_batch()", "            pass"),
        ("stale state", "self._n_labels, self._sums = 0, {}", "pass"),
        ("lost setting", "center = self.center and records is self.found.groups", "center = self.center"),
        ("ignored weights", ".current.project(x, row_norms(g, None, 2))", ".current.project(x)"),
        ("dropped factor", "norms.square().sum() / y.shape[-1]", "norms.square().sum()"),
        ("off by one", "if n_bad > skip_bad_batches:", "if n_bad >= skip_bad_batches:"),
        ("wrong count", "total += reading", "total += 1"),
        ("missing check", "last < 0.75 * mean and ", ""),
    ],
    "collection/losses.py": [
        ("off by one", "(labels[:, 1:] if shifted else labels) != IGNORED", "labels != IGNORED"),
        ("off by one", "labels.shape[1] - max(first - 1, 0)", "labels.shape[1] - first"),
        ("ignored mask", "return losses.sum() / labelled.sum()", "return losses.mean()"),
    ],
    "collection/settings.py": [
        ("lost setting", '"fingerprint", "rank", "center", "token_mask",', '"fingerprint", "rank", "token_mask",'),
    ],
    "planning/allocate.py": [
        ("dropped factor", "priority = block / (width * weight[unit])", "priority = block / width"),
        ("dropped term", "take_while_affordable(steps, limit - fixed)", "take_while_affordable(steps, limit)"),
        ("missing check", '(best.mean() if budget.coverage == "total" else best.min())', "best.mean()"),
        ("off by one", "if cost > budget:", "if cost >= budget:"),
        ("off by one", "steps.rank - steps.width < needed[steps.unit]",
         "steps.rank - steps.width <= needed[steps.unit]"),
        ("lost setting", "round(min(rho * average,", "round(min(average,"),
        ("dropped term", "total[unit, rank] - total[unit, previous]", "total[unit, rank]"),
    ],
    "planning/budgets.py": [
        ("lost dtype", '"float16": 2, "bfloat16": 2', '"float16": 2, "bfloat16": 4'),
        ("dropped factor", 'count * n_layers if kind == "rank" else count', "count"),
    ],
    "planning/limits.py": [
        ("off by one", "np.arange(self.multiple_of, top + 1, self.multiple_of",
         "np.arange(self.multiple_of, top, self.multiple_of"),
        ("lost setting", "unit[joined] = unit[joined].min()", "pass"),
        ("missing check", ' or fnmatchcase(name, f"*.{pattern}")', ""),
        ("missing check", "of_layer[0] = limit.min_rank == 0", "of_layer[0] = True"),
    ],
    "planning/policies.py": [
        ("wrong power", "(ratios**2).sum(axis=1)", "ratios.sum(axis=1)"),
        ("dropped factor", "importance[:, 0] / widths**0.5", "importance[:, 0]"),
        ("off by one", "np.arange(n_ranks) + 0.5", "np.arange(n_ranks) + 1.5"),
    ],
    "planning/plan.py": [
        ("missing check", "fingerprint and made.fingerprint != fingerprint", "False"),
    ],
    "planning/spectra.py": [
        ("missing check", " & ((collected < asked) | few_rows)", ""),
    ],
    "planning/lora_config.py": [
        ("lost setting", "lora_alpha / (math.sqrt(rank) if use_rslora else rank)", "lora_alpha / rank"),
    ],
    "building/build.py": [
        ("dropped factor", " * (2.0 / math.pi)", ""),
        ("wrong power", "squares += float(error.norm()) ** 2", "squares += float(error.norm())"),
        ("dropped factor", "return rank * both // b_alone", "return rank"),
        ("lost setting", "min(rank, int(bound)) // groups * groups", "min(rank, int(bound))"),
        ("missing check", "if rank > target.in_features:", "if False:"),
    ],
    "adapters/base_weights.py": [
        ("wrong sign", "plain.weight.float() - (added.T if", "plain.weight.float() + (added.T if"),
        ("wrong sign", "return output - ((args[0]", "return output + ((args[0]"),
        ("missing check", "if owners[id(weight)] > 1:", "if False:"),
        ("missing check", "made_for != fingerprint(model)", "False"),
        ("stale cache", "a.to(device, copy=True)", "a.to(device)"),
    ],
    "adapters/config.py": [
        ("missing check", "if config.task_type not in (None, stats.provenance.task_type):", "if False:"),
    ],
    "starts/initializers.py": [
        ("wrong power", "rows / whitening_scale(spectrum, rank)[:, None]",
         "rows * whitening_scale(spectrum, rank)[:, None]"),
        ("wrong power", "a * math.sqrt(wanted / own)", "a * (wanted / own)"),
        ("dropped term", ".double().cpu() + of_mean", ".double().cpu()"),
        ("swapped arguments", "gradient.left[rank : 2 * rank].T", "gradient.left[:rank].T"),
        ("wrong sign", "left = -(gradient.left[:k]", "left = (gradient.left[:k]"),
        ("dropped term", "moment + _DAMPING * moment.mean()", "moment"),
        ("dropped factor", "len(weights.b) ** 0.25 / gamma**0.5", "1.0 / gamma**0.5"),
        ("dropped factor", "left[:rank].T * root)", "left[:rank].T)"),
        ("dropped term", "(spectrum.explained_variance - rest).clamp_min(0.0)", "spectrum.explained_variance"),
        ("dropped factor", "(right / size * share)", "(right * share)"),
    ],
    "building/step_size.py": [
        ("wrong power", "init.scaling * (gamma or first) / candidate", "init.scaling * candidate / (gamma or first)"),
        ("missing check", " or not (gamma or loss < before)", ""),
    ],
    "rates/learning_rate.py": [
        ("dropped factor", "scaling * growth / size.output", "growth / size.output"),
        ("wrong sign", "STEPS / self.steps / self.share", "self.steps / STEPS / self.share"),
        ("dropped factor", "STEPS / self.steps / self.share", "STEPS / self.steps"),
        ("lost setting", " * (NEW_HEAD if self.new_head else 1.0)", ""),
    ],
    "adapters/measured_rate.py": [
        ("wrong power", "sums.mean(name) ** 0.5", "sums.mean(name)"),
        ("wrong power", "norms.square() / y.shape[-1]", "norms / y.shape[-1]"),
    ],
    "serving/intruders.py": [
        ("wrong sign", "(vectors.T @ before).abs().amax(dim=1)", "(vectors.T @ before).amax(dim=1)"),
        ("swapped axes", "return matrix.T if is_conv1d(layer) else matrix", "return matrix"),
    ],
    "building/quantized.py": [
        ("dropped term", "(exact + bias).to(rows.dtype)", "exact.to(rows.dtype)"),
        ("missing check", "if not (after < before or unchecked):", "if False:"),
    ],
    "adapters/peft_eva.py": [
        ("lost setting", "round(rank * config.eva_config.rho)", "round(rank)"),
        ("wrong order", "argsort(descending=True", "argsort(descending=False"),
        ("lost dtype", "part.to(dtype)", "part.to(torch.float32)"),
    ],
    "adapters/peft_model.py": [
        ("missing check", "if any(bool(weight.any()) for weight in weights if not weight.is_meta):", "if False:"),
        ("forgotten state", "            tensor.data.copy_(value)", "            pass"),
        ("forgotten state", "            parameter.requires_grad_(requires_grad)", "            pass"),
        ("forgotten state", "        restore()\n        raise\n    return peft_model",
         "        raise\n    return peft_model"),
    ],
    "adapters/directory.py": [
        ("stale key", "weight.detach().cpu().bfloat16()", "weight.detach().cpu()[:1].bfloat16()"),
    ],
    "training/callback.py": [
        ("lost setting", 'schedule.base_lrs = [one * factor for one in schedule.base_lrs]', "pass"),
        ("dropped factor", "args.train_batch_size * args.world_size", "args.train_batch_size"),
    ],
    "trainers/trainers.py": [
        ("dropped factor", "args.train_batch_size * args.gradient_accumulation_steps * args.world_size",
         "args.train_batch_size * args.world_size"),
        ("stale state", "trainer.data_collator = copy.deepcopy(trainer.data_collator)", "pass"),
    ],
    "trainers/trl.py": [
        ("ignored mask", 'masked_fill(batch["completion_mask"] == 0, IGNORED)', 'clone()'),
    ],
    "trainers/prompts.py": [
        ("ignored mask", "whole.masked_fill(mask == 0, IGNORED)", "whole"),
    ],
    "serving/base.py": [
        ("dropped factor", "layer.scaling * (b.float() @ a.float())", "b.float() @ a.float()"),
        ("swapped axes", "return change.T if transposed else change", "return change"),
        ("dropped term", "torch.linalg.norm(summed", "torch.linalg.norm(plain"),
        ("lost setting", "untied = base.tied and not", "untied = False and not"),
        ("lost dtype", ".to(weight.dtype).contiguous()", ".float().contiguous()"),
    ],
    "serving/compress.py": [
        ("dropped factor", "(layer.scaling * values).square()", "values.square()"),
        ("wrong power", "factors.values[..., :rank].sqrt()", "factors.values[..., :rank]"),
        ("off by one", "if spent + costs[name] <= budget:", "if spent + costs[name] < budget:"),
    ],
    "serving/trained.py": [
        ("wrong sign", "self.b.float() * (self.scaling / scaling)", "self.b.float() * (scaling / self.scaling)"),
        ("wrong power", "squares += layer.scaling**2 *", "squares += layer.scaling *"),
        ("missing check", "elif not all(tensor.isfinite().all() for tensor in tensors.values()):", "elif False:"),
    ],
    "serving/export.py": [
        ("lost dtype", "int(self.megabytes * 10**6 / (engine.bytes_each or own))", "int(self.megabytes * 10**6 / own)"),
        ("missing check", "if merge_into is not None and start is None and began.error_size:", "if False:"),
    ],
    "serving/fit.py": [
        ("missing check", "_TENSOR.fullmatch(key) and dtype not in _FLOATS", "False"),
        ("missing check", "if known and known != here:", "if False:"),
    ],
    "serving/kept.py": [
        ("wrong sign", "after - before, after - parts[1]", "after - before, after - parts[0]"),
        ("swapped arguments", "(p.exp() * (p - q)).sum()", "(q.exp() * (p - q)).sum()"),
        ("ignored mask", "[:, :-1][labelled]", "[:, 1:][labelled]"),
    ],
    "serving/support.py": [
        ("missing check", "if not scales_alike:", "if False:"),
    ],
    "serving/engines.py": [
        ("off by one", "rank <= VLLM_RANKS[-1]", "rank < VLLM_RANKS[-1]"),
    ],
    "serving/verify.py": [
        ("wrong power", "(observed - local).square().nanmean().sqrt()", "(observed - local).square().nanmean()"),
        ("off by one", "logits[i, len(text) - 1]", "logits[i, len(text) - 2]"),
        ("forgotten state", "float(name not in members)", "1.0"),
    ],
    "serving/watch.py": [
        ("off by one", "while len(self._kept) > self._keep:", "while len(self._kept) >= self._keep:"),
    ],
    "serving/writers.py": [
        ("dropped factor", "layer.scaling * layer.rank / alpha", "layer.scaling / alpha"),
        ("swapped axes", "rows.reshape(heads, 2, len(rows) // heads // 2, -1)",
         "rows.reshape(heads, len(rows) // heads // 2, 2, -1)"),
        ("unclosed file", "    writer.close()", "    pass"),
    ],
    "serving/server.py": [
        ("leaked secret", 'said = said.replace(secret, "...")', "pass"),
    ],
    "keep/dial.py": [
        ("wrong sign", "* (1.0 + self.lose)", "* (1.0 - self.lose)"),
        ("wrong sum", "float(losses[:, 0].sum() / losses[:, 1].sum())", "float((losses[:, 0] / losses[:, 1]).mean())"),
        ("dropped term", "on_task, on_kept - base, weight", "on_task, on_kept, weight"),
        ("dropped factor", "before[name] * value", "value"),
        ("dropped factor", "1.96 * math.sqrt(", "math.sqrt("),
        ("missing check", "if share >= _SHARED:", "if False:"),
    ],
    "keep/dialed.py": [
        ("dropped factor", "scaling=layer.scaling * dialed.strengths[n]", "scaling=layer.scaling"),
    ],
    "keep/replay.py": [
        ("ignored mask", "[0] * (longest - len(one)) + [1] * len(one)", "[1] * longest"),
    ],
    "bank/embeddings.py": [
        ("ignored mask", "mask & (labels == IGNORED)", "mask | (labels == IGNORED)"),
    ],
    "bank/generator.py": [
        ("dropped term", "(embeddings - self.shift) / self.spread", "embeddings / self.spread"),
        ("wrong order", "b=layer.b @ rotation.T", "b=layer.b @ rotation"),
    ],
    "bank/mixture.py": [
        ("ignored weights", "layer.rescaled(1.0).b * weight", "layer.rescaled(1.0).b"),
    ],
    "bank/similarity.py": [
        ("dropped factor", "(rows.double().mean(0) - mean) / spread)", "(rows.double().mean(0) - mean))"),
    ],
    "bank/start.py": [
        ("dropped factor", "(gamma * scaling_of(lora_alpha, rank, False)) ** 0.5", "gamma**0.5"),
        ("missing check", "(d_in, d_out) != (targets[name].in_features, targets[name].out_features)", "False"),
    ],
    "bank/store.py": [
        ("missing check", " or _hash_of(path) != expected", ""),
        ("missing check", "if not any(bool(layer.b.any())", "if False and not any(bool(layer.b.any())"),
    ],
    "comparison/effects.py": [
        ("dropped factor", "(1 - confidence) / (2 * len(compared))", "(1 - confidence) / 2"),
        ("wrong power", "factor * math.sqrt(2 / n_seeds)", "factor * math.sqrt(1 / n_seeds)"),
    ],
    "comparison/budget.py": [
        ("dropped factor", "1 - (1 - CONFIDENCE) / len(STAGES)", "CONFIDENCE"),
    ],
    "comparison/findings.py": [
        ("wrong sign", "closed=-effect.mean / left", "closed=effect.mean / left"),
        ("missing check", "abs(ratio - 1) > _EQUAL_PARAMETERS", "False"),
        ("wrong sign", "losses.loc[RANDOM] - losses.loc[FULL]", "losses.loc[FULL] - losses.loc[RANDOM]"),
    ],
    "comparison/runs.py": [
        ("missing check", ' and record["learning_rate"] not in unstable', ""),
        ("missing check", 'theirs["data_order"] != record["data_order"]', "False"),
        ("ignored mask", "for seed in shared or own)", "for seed in own)"),
        ("wrong sign", 'table["retained_after"] - table["retained_before"]',
         'table["retained_before"] - table["retained_after"]'),
    ],
    "comparison/tasks.py": [
        ("missing check", "if tuple(item.tokens[0]) not in seen:", "if True:"),
        ("off by one", "len(choice[0]) < reader.limit", "len(choice[0]) <= reader.limit"),
    ],
    "comparison/training.py": [
        ("lost setting", "loss / count if task.normalize else loss", "loss"),
        ("off by one", "return (step + 1) / warm", "return step / warm"),
        ("wrong sign", "(1.0 + math.cos(", "(1.0 - math.cos("),
        ("wrong sign", "losses.index(min(losses))", "losses.index(max(losses))"),
        ("lost setting", "(weight * loss).backward()", "loss.backward()"),
    ],
    "comparison/workbench.py": [
        ("stale cache", 'f"seed{seed}-{kind}.safetensors"', 'f"seed{seed}.safetensors"'),
        ("stale cache", "if run.seed not in self._before:", "if not self._before:"),
    ],
    "comparison/starts.py": [
        ("dropped factor", "return replace(ranks, rank=rank)", "return ranks"),
        ("forgotten hook", "            handle.remove()", "            pass"),
    ],
    "comparison/workers.py": [
        ("off by one", "if died[run] < 2:", "if died[run] < 1:"),
    ],
    "loading/reader.py": [
        ("dropped term", "if ends and eos is not None", "if False and eos is not None"),
        ("wrong sum", "count_common(tokens(before), ids) if before else 0", "len(tokens(before)) if before else 0"),
        ("missing check", "if len(ids) > limit and ids[-1] ==", "if False and ids[-1] =="),
    ],
    "loading/examples.py": [
        ("ignored mask", 'if i >= first and turn["role"] == "assistant"', 'if turn["role"] == "assistant"'),
        ("missing check", "value is None or value != value or not", "value is None or not"),
    ],
    "loading/batches.py": [
        ("ignored mask", '{"input_ids": pad, "labels": IGNORED}', '{"input_ids": pad, "labels": pad}'),
        ("lost setting", "islice(usable, offset, None if", "islice(usable, 0, None if"),
    ],
    "loading/sources.py": [
        ("off by one", "return starts[index + 1]", "return starts[index]"),
    ],
    "loading/checkpoint.py": [
        ("missing check", 'if "quantization_config" in read_json(', 'if "" == read_json('),
    ],
    "files.py": [
        ("missing check", "if marker not in present:", "if False:"),
        ("missing check", "digests_of(directory, digests) == digests", "True"),
        ("unclosed file", "            fresh.unlink()", "            pass"),
    ],
    "cli/options.py": [
        ("dropped factor", ' / (100 if text.endswith("%") else 1)', ""),
    ],
    "collection/processes.py": [
        ("dropped term", "whole.merge(from_bytes(received[0]))", "from_bytes(received[0])"),
        ("shared state", "whole, step = from_bytes(to_bytes(collected)), 1", "whole, step = found, 1"),
        ("missing check", "if theirs.get(setting) != first:", "if False:"),
        ("stale count", "start = used[processes.rank] if used else 0", "start = 0"),
    ],
    "layers/wrappers.py": [
        ("forgotten state", "            module.reshard()", "            pass"),
        ("wrong name", 'name.split(".") if part not in WRAPPED)', 'name.split("."))'),
        ("lost tensor", "tensor = kept[id(modules[owner])][ending]", "pass"),
        ("lost precision", "return self.on(enabled=False)", "return self.on()"),
    ],
    "loading/models.py": [
        ("wrong order", '(getattr(config, "id2label", None) or {}).items())',
         '(getattr(config, "id2label", None) or {}).items(), reverse=True)'),
        ("lost setting", "model.config.pad_token_id = padding_token(self.tokenizer)", "pass"),
        ("lost seed", "torch.manual_seed(seed)", "pass"),
        ("lost name", 'frozenset([*loading["missing_keys"], *reshaped])', 'frozenset(loading["missing_keys"])'),
        ("missing check", "if is_quantized:\n            raise", "if False:\n            raise"),
    ],
    "building/pipeline.py": [
        ("wrong rows", '"offset": sample.offset + sample.samples', '"offset": sample.offset'),
        ("missing check", "if {*classes} == {*head} and tuple(classes) != head:", "if False:"),
        ("missing check", "if config.start.one_rank and round(rho * rank) > rank:", "if False:"),
        ("lost setting", "rho or config.ranks.rho, SPARE", "self.rho or 1.0, SPARE"),
        ("lost setting", "DEFAULT_FOR_CLASSES if classifies else DEFAULT", "DEFAULT"),
        ("lost head", "whole += [name for name in heads_of(model) if not is_in(name, (*heads, *whole))]", "pass"),
    ],
    "building/layer_start.py": [
        ("missing check", "if list(error.shape) != shape or not bool(error.isfinite().all()):",
         "if list(error.shape) != shape:"),
        ("lost dtype", "error.to(torch.promote_types(error.dtype, torch.float32))", "error"),
        ("lost setting", "if not (start.matched or context.shape.unit_rows):", "if not start.matched:"),
        ("missing check", "if not bool(a.isfinite().all() and b.isfinite().all()):",
         "if not bool(a.isfinite().all()):"),
        ("same draw", "layer_generator(self.context.seed, self.part)",
         "layer_generator(self.context.seed, self.target.name)"),
        ("lost setting", "weights if context.shape.gamma is None else scaled_by_gamma(weights, context.shape.gamma)",
         "weights"),
    ],
    "adapters/adapter_init.py": [
        ("dropped factor", " // max(self.targets[name].experts, 1) for", " for"),
        ("lost setting", "LearningRate(self.responses, self.steps or steps,", "LearningRate(self.responses, steps,"),
        ("lost setting", "new_head = self.provenance.task_type in HEADS", "new_head = False"),
        ("lost setting", "            freeze_a(adapted)", "            pass"),
    ],
    "errors.py": [
        ("missing check", "isinstance(value, Integral) or not whole", "True"),
    ],
    "adapters/init_config.py": [
        ("lost setting", "return self.run.gradients or self.start.needs_gradient", "return self.start.needs_gradient"),
    ],
}
# fmt: on
