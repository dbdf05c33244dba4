// Wording of argument errors: where, expected, got, remedy. Errors are ValueError in Python.
#pragma once

#include <c10/util/Exception.h>

/// CTRLORA_CHECK(ok, "ctrlora::f", "expected ...; got ", value, ". Remedy: ...")
#define CTRLORA_CHECK(condition, where, ...) \
  TORCH_CHECK_VALUE(condition, "[", where, "] ", __VA_ARGS__)
