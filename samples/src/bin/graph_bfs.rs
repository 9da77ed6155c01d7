//! A graph of boxes that point at one another: a Vulkan compute shader finds how far each node is from the first, by these pointers.
//!
//! `graph_bfs [NODES [DEVICE]]`: 5000 nodes without the first, and the first Vulkan device without the second, which is a part of its name.
//! Each way in which the shader can reach them is tried, and compared with the CPU. `translated` needs the driver (`modprobe hmm_gpu`).

use std::collections::VecDeque;
use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use hmm_gpu::{Graph, Shipped, Strategy, SvmContext};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("graph_bfs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let nodes: usize = arguments.next().map_or(Ok(5000), |text| text.parse())?;
    let device = arguments.next();

    let edges = edges(nodes);
    let expected = on_the_cpu(nodes, &edges);
    let mut graph = Graph::new(nodes, &edges)?;
    println!(
        "{nodes} nodes, each in a box of its own, and {} edges. Nodes at each distance from the first:",
        edges.len()
    );
    let deepest = expected.iter().flatten().max().map_or(0, |&level| level);
    for level in 0..=deepest {
        print!(" {}", count(&expected, Some(level)));
    }
    println!("; not reached: {}.\n", count(&expected, None));

    let mut ways = 0;
    for strategy in Strategy::ALL {
        let mut builder = SvmContext::builder().strategy(strategy);
        if let Some(name) = &device {
            builder = builder.device(name);
        }
        match builder.build() {
            Ok(context) => {
                println!("{context}");
                // It is compiled here.
                context.kernel(Shipped::Bfs)?;
                let begin = Instant::now();
                let (levels, stats) = context.breadth_first(&mut graph, 0)?;
                println!("  {:8.2} ms  {stats}", begin.elapsed().as_secs_f64() * 1e3);
                if levels != expected {
                    return Err(format!("{context}: a distance is wrong").into());
                }
                ways += 1;
            }
            Err(error) => println!("{error}"),
        }
    }
    if ways == 0 {
        return Err("there is no way".into());
    }
    println!("\nAll distances are right, each time.");
    Ok(())
}

/// As many edges as nodes, between any two of them: some are not reached.
fn edges(nodes: usize) -> Vec<(usize, usize)> {
    let mut state = 1_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % nodes
    };
    (0..nodes).map(|_| (random(), random())).collect()
}

/// What the shader must find.
fn on_the_cpu(nodes: usize, edges: &[(usize, usize)]) -> Vec<Option<u32>> {
    let mut neighbours = vec![Vec::new(); nodes];
    for &(one, other) in edges {
        neighbours[one].push(other);
        neighbours[other].push(one);
    }
    let mut levels = vec![None; nodes];
    let mut queue = VecDeque::from([(0, 0)]);
    while let Some((node, level)) = queue.pop_front() {
        if levels.get(node) == Some(&None) {
            levels[node] = Some(level);
            queue.extend(neighbours[node].iter().map(|&other| (other, level + 1)));
        }
    }
    levels
}

fn count(levels: &[Option<u32>], of: Option<u32>) -> usize {
    levels.iter().filter(|&&level| level == of).count()
}
