// Symbol visibility: the library is built with hidden symbols; CTRLORA_API marks what it exports.
#pragma once

#if defined(_WIN32)
#if defined(CTRLORA_BUILDING)
#define CTRLORA_API __declspec(dllexport)
#else
#define CTRLORA_API __declspec(dllimport)
#endif
#else
#define CTRLORA_API __attribute__((visibility("default")))
#endif
