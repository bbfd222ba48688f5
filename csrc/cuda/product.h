// Whole products: C++ looks whether operands are like those that were multiplied before, makes the output and launches.
// One call from Python takes the place of checks, choice and launch in Python.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../bind.h"
#include "launch.h"

namespace sparsekern {

// A launch with the names of its arguments: "tokens", "stream" and those of its tensors, in this order.
struct NamedLaunch {
    Launch launch;
    std::vector<std::string> words;
    std::vector<py::object> interned_words;
    py::object owner;  // unloads the function when it goes
};
using SharedLaunch = std::shared_ptr<const NamedLaunch>;

// What decides how operands are multiplied, but for their addresses and the number of tokens.
struct Geometry {
    PyObject* dtype = nullptr;  // one of torch's constants, which live as long as torch
    std::string precision;      // of float32 only
    int64_t device = 0, index_bytes = 0;
    std::array<int64_t, 5> layout{};  // the numbers of a Layout
    bool transpose = false, bare = true;

    bool operator==(const Geometry& other) const;
};
struct GeometryHash {
    size_t operator()(const Geometry& geometry) const;
};

// What an operand must be: rows of so many features, with any stride or contiguous in any number of axes; a contiguous
// tensor of so many bytes; or None. Of the layout: the index, whose bytes the geometry says; or block rows of so many
// bytes.
struct Operand {
    enum Kind { ROWS, WHOLE, NOTHING, INDEX, BLOCK_ROWS } kind;
    std::string name;
    int64_t size;
};
constexpr size_t MAX_OPERANDS = 4;

// How operands of one geometry are multiplied.
struct Product {
    enum Source { OUTPUT = -1, PARTS = -2, NULL_POINTER = -3 };
    struct Entry {
        SharedLaunch launch, sum;  // the sum of the product's parts, if there are several
        int parts = 1;
        std::vector<int> sources;  // of the launch's tensors: an operand, or a Source
        std::array<bool, MAX_OPERANDS> reads{};
    };

    std::vector<Operand> operands;  // those with rows first, those of the layout last
    int64_t features;               // of the output's rows; 0 where the output is blocks
    py::tuple blocks;               // shape of such an output
    std::array<std::shared_ptr<const Entry>, 63> entries;  // for 2^n to 2^(n + 1) - 1 tokens

    void add(int bucket, SharedLaunch launch, int parts, SharedLaunch sum);
};

// One of the two products, for all geometries that were learnt.
class Products {
public:
    Products(py::function current_device, py::function current_stream, py::function precision);

    Product& of(const Geometry& geometry) { return learnt[geometry]; }
    // The output; None, and nothing was launched, where the operands are others than were learnt. `values` are the
    // operands that are not the layout's, the first of which says dtype and device.
    py::object multiply(PyObject* const* values, PyObject* layout, bool transpose, bool bare) const;

private:
    py::object multiply(const Product& product, const Geometry& geometry, PyObject* const* values,
                        PyObject* layout) const;

    const py::function current_device, current_stream, precision;
    std::unordered_map<Geometry, Product, GeometryHash> learnt;
};

}  // namespace sparsekern
