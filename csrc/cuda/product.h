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

// All that decides how operands are multiplied, but for addresses and the number of tokens.
struct Geometry {
    PyObject* dtype = nullptr;  // one of torch's constants, which live as long as torch
    std::string precision;      // of float32 only
    int64_t device = 0, index_bytes = 0;
    std::array<int64_t, 5> layout{};  // the numbers of a Layout
    bool transpose = false, bare = true;

    bool operator==(const Geometry& other) const {
        return dtype == other.dtype && device == other.device && index_bytes == other.index_bytes &&
               layout == other.layout && transpose == other.transpose && bare == other.bare &&
               precision == other.precision;
    }
};
struct GeometryHash {
    size_t operator()(const Geometry& geometry) const;
};

// What an operand must be: rows of so many features, with any stride or contiguous in any number of axes; a contiguous
// tensor of so many elements; or a topology's tensor of so many bytes, which has a dtype of its own.
struct Operand {
    enum Kind { ROWS, WHOLE, BYTES } kind;
    std::string name;
    int64_t size;
    bool in_geometry;  // whether the geometry says dtype, device and bytes already
};

// A product of one geometry.
class Product {
public:
    Product(std::vector<Operand> operands, int64_t features, py::tuple blocks);

    // Launches for 2^bucket to 2^(bucket + 1) - 1 tokens: the product, and the sum of its parts if there are several.
    void add(int bucket, SharedLaunch launch, int parts, SharedLaunch sum);
    const std::vector<Operand>& all_operands() const { return operands; }

private:
    friend class Products;
    enum Source { OUTPUT = -1, PARTS = -2, NULL_POINTER = -3 };
    struct Entry {
        SharedLaunch launch, sum;
        int parts = 1;
        std::vector<int> sources;  // of the launch's tensors: an operand, or a Source
        std::vector<bool> reads;   // by operand
    };
    struct Rows {
        int64_t tokens, stride;
    };

    bool read_rows(const Argument& tensor, int64_t features, Rows& rows) const;
    py::object new_output(PyObject* like) const;
    py::object new_parts(PyObject* like, int parts) const;

    const std::vector<Operand> operands;  // those with rows first
    const int64_t features;               // of the output's rows; 0 where the output is blocks
    const py::tuple blocks;               // shape of such an output
    std::array<Entry, 63> entries;
};

// One of the two products, of all geometries that were learnt.
class Products {
public:
    Products(std::string name, py::function current_device, py::function current_stream, py::function precision);

    Product& of(const Geometry& geometry, std::vector<Operand> operands, int64_t features, py::tuple blocks);
    // The output; None, and nothing was launched, where the operands are others or no launch was added for them.
    // `values` are dds's x, weight and bias, or sdd's dy and x.
    py::object multiply(std::array<PyObject*, 3> values, PyObject* like, PyObject* layout, bool transpose) const;

    const std::string name;
    std::vector<py::object> words;  // that a call from Python brings

private:
    bool is_plain(PyObject* tensor) const;
    bool read(Geometry& geometry, PyObject* like, PyObject* layout) const;
    py::object run(const Product& product, const Geometry& geometry, const std::array<PyObject*, 5>& values) const;

    const py::function current_device, current_stream, precision;
    const py::object plain_tensor, parameter, float32;
    std::unordered_map<Geometry, std::shared_ptr<Product>, GeometryHash> learnt;
};

}  // namespace sparsekern
